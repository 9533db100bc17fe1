"""format=adapter: a folder for servers, plain LoRA with one rank and one scale for all layers.

vLLM, TGI and SGLang read the factors, `r` and `lora_alpha`. They ignore patterns; SGLang also ignores rsLoRA's scale.
Both are folded into the factors: zero rows of A and zero columns of B raise a rank, and B is multiplied by the scale,
after which `lora_alpha = r` is a scale of 1. Everything that cannot be folded is refused.
A model with towers gets the names that vLLM maps to its own (`ModelFamily.served`).
Source: vLLM's lora/peft_helper.py and lora/lora_model.py, TGI's adapters/lora.py, SGLang's lora/lora.py.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from finetune.config.compose import saved_config
from finetune.export.exporter import Exported, ExportRequest
from finetune.export.staging import MODEL_COPIES, copy_files
from finetune.export.verify import Verification, compare, open_model, source_answers
from finetune.models.adapters.files import (
    CONFIG_FILE,
    TENSOR_FILE,
    check_adapter,
    fetch_adapter,
    load_adapter,
    other_base,
    other_updates,
    scaling_of,
)
from finetune.models.adapters.names import PREFIX
from finetune.models.adapters.trained import compensates_quantization
from finetune.models.families import FAMILIES, ModelFamily, family_of
from finetune.models.hub import find_texts, read_config
from finetune.models.safetensors_header import read_header
from finetune.models.safetensors_index import save_tensors
from finetune.models.tokenizer import quiet
from finetune.system.atomic import write_text
from finetune.system.errors import ConfigError, IntegrityError

_FOUR_BIT, _TOWERS = ["--quantization", "bitsandbytes"], ["--enable-tower-connector-lora"]
# Allowed values of vLLM's --max-lora-rank.
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
# Only a merged model can hold these.
_MERGED_ONLY = {
    "use_dora": "DoRA scales rows of the whole weight, not only the update",
    "modules_to_save": "modules trained in full replace the base's, which adapters share",
    "trainable_token_indices": "rows of new tokens belong to the embedding, which adapters share",
}


def merge_reasons(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings of an adapter that no factors of one rank and scale can hold."""
    for key, reason in _MERGED_ONLY.items():
        if value := config.get(key):
            yield f"{key}={json.dumps(value)}: {reason}"
    if (bias := config.get("bias", "none")) != "none":
        yield f"bias={bias}: the biases of the base's layers are trained"
    yield from other_updates(config)
    if init := other_base(config):
        yield f"init_lora_weights={init}: the adapter needs other weights than those of the base in its config"


def check_libraries(kind: str) -> None:
    """Need no library of an extra."""


def write(request: ExportRequest) -> Exported:
    """Write the adapter to a folder of its own, with the command that serves it.

    If the base is a local folder, PEFT compares the written adapter with its source: bit for bit if nothing is folded.

    Raises:
        ConfigError: lists everything that servers do not support.
        IntegrityError: the adapter is corrupt, or the written one computes something else.
    """
    adapter = fetch_adapter(str(request.source), "adapter")
    check_adapter(request.source)
    config, tensors = adapter.config, adapter.tensors
    base = request.options.model or str(config["base_model_name_or_path"])
    revision = None if request.options.model else config.get("revision")
    family = _media_family(base, revision, tensors)
    if reasons := list(_obstacles(config, tensors, family)):
        raise ConfigError(
            f"adapter={adapter.name}: servers do not support {'; '.join(reasons)}\n"
            "help: merge it into its base: finetune export format=safetensors, or finetune merge"
        )
    common = (config["r"], config["lora_alpha"] / config["r"])
    same = all((rank, scaling_of(config, layer, rank)) == common for layer, rank in _ranks(tensors).items())
    folded = not same or bool(config.get("use_rslora") and config["r"] > 1)
    if family is not None:
        tensors = {_served(name, family): tensor for name, tensor in tensors.items()}
    # Another program's names were converted, or servers have other names.
    renamed = tensors.keys() != read_header(request.source / TENSOR_FILE)[1].keys()
    if folded:
        tensors = _fold(config, tensors)
    towers = family is not None and any(_in_towers(name, family) for name in adapter.tensors)
    if folded or renamed:
        save_tensors(tensors, request.out / TENSOR_FILE, metadata={"format": "pt"})
    else:
        shutil.copyfile(request.source / TENSOR_FILE, request.out / TENSOR_FILE)
    rank = max(_ranks(tensors).values())
    written = {**config, "base_model_name_or_path": base, "revision": revision, "rank_pattern": {}, "alpha_pattern": {}}
    if folded:
        written |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    write_text(request.out / CONFIG_FILE, json.dumps(written, indent=2, sort_keys=True) + "\n")
    copy_files(request.source, request.out, MODEL_COPIES)
    check_adapter(request.out)
    checks = []
    if request.options.verify:
        if (folder := Path(base).expanduser()).is_dir():
            checks = [_verify(request, folder, folded, family)]
        else:
            request.log(f"verify: skipped, since the base {base} is no local folder; pass model=FOLDER")
    four_bit = compensates_quantization(saved_config(request.source))
    if four_bit:
        request.log("adapter: it compensates the error of quantization; the command serves it over the base in 4 bit")
    notes = {"rank": rank, "folded": folded, "base": base, "four_bit_base": four_bit}
    serve = _serve(request, base, revision, rank, (_FOUR_BIT if four_bit else []) + (_TOWERS if towers else []))
    return Exported(checks, [serve], notes)


def _media_family(base: str, revision: str | None, tensors: dict[str, Tensor]) -> ModelFamily | None:
    """Return the family of a base with towers; None for a model that reads text only, whose files are not needed."""
    decoders = tuple(f"{PREFIX}{family.decoder}." for family in FAMILIES.values() if family.towers)
    if not any(name.startswith(decoders) or _in_towers(name, *FAMILIES.values()) for name in tensors):
        return None
    return family_of(read_config(find_texts(base, revision, "model").folder, base)["model_type"], f"model={base}")


def _in_towers(name: str, *families: ModelFamily) -> bool:
    return name.removeprefix(PREFIX).startswith(tuple(start for each in families for start in each.tower_prefixes))


def _served(name: str, family: ModelFamily) -> str:
    return PREFIX + family.name_for_servers(name.removeprefix(PREFIX))


def _obstacles(config: dict[str, Any], tensors: dict[str, Tensor], media: ModelFamily | None) -> Iterator[str]:
    """Yield the reasons why servers do not support the adapter. media: the family of a base with towers."""
    yield from merge_reasons(config)
    known = {module for family in FAMILIES.values() for module in family.linear_modules}
    if media is not None and any(_in_towers(name, media) for name in tensors):
        if media.serves_towers:
            known |= {module for tower in media.towers.values() for module in tower.linears}
        else:
            yield f"lora.towers: vLLM has no adapters of the towers of {media.title}"
    layers = {name: match["layer"] for name in tensors if (match := _FACTOR.fullmatch(name))}
    other = [name for name in tensors if name not in layers or layers[name].rpartition(".")[2] not in known]
    if media is not None:
        other = [name for name in other if media.serves_towers or not _in_towers(name, media)]
    if other and not any(config.get(key) for key in _MERGED_ONLY):
        yield f"tensors other than factors of the blocks' linear layers, as {', '.join(sorted(other)[:3])}"
    if layers and (rank := max(_ranks(tensors).values())) > MAX_RANKS[-1]:
        yield f"rank {rank}: the largest rank of vLLM is {MAX_RANKS[-1]}"


def _ranks(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the rank of each layer."""
    matches = ((_FACTOR.fullmatch(name), tensor) for name, tensor in tensors.items())
    return {match["layer"]: len(tensor) for match, tensor in matches if match and match["side"] == "A"}


def _fold(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return fp32 factors of one rank and scale 1 with the same update; B is rounded unless its scale is a power of 2.

    Shapes: lora_A [R, in], lora_B [out, R], with R the largest rank of all layers.
    """
    ranks = _ranks(tensors)
    most = max(ranks.values())
    folded = {}
    for layer, rank in ranks.items():
        name_A, name_B = (f"{PREFIX}{layer}.lora_{side}.weight" for side in "AB")
        folded[name_A] = pad(tensors[name_A].float(), (0, 0, 0, most - rank))
        folded[name_B] = pad(tensors[name_B].float() * scaling_of(config, layer, rank), (0, most - rank))
    return folded


def _verify(request: ExportRequest, base: Path, folded: bool, family: ModelFamily | None) -> Verification:
    answers = source_answers(base, request.options, request.source)
    with quiet(), TemporaryDirectory(dir=request.out, prefix=".peft-") as scratch:
        folder = request.out
        if family is not None and family.served:
            # PEFT has the names of the model: those of its files, mapped as a checkpoint's are.
            folder = Path(scratch)
            named = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(request.out / TENSOR_FILE).items()}
            back = {f"{PREFIX}{family.name_in_model(name)}": tensor for name, tensor in named.items()}
            save_tensors(back, folder / TENSOR_FILE)
            shutil.copyfile(request.out / CONFIG_FILE, folder / CONFIG_FILE)
        served = load_adapter(open_model(base), folder)
    found = compare(answers, lambda ids: served(input_ids=torch.tensor([ids])).logits[0].float(), "PEFT", exact=True)
    # Folding changes the order of sums: some units in the last place of the largest logit.
    allowed = 1e-4 * max(float(logits.abs().max()) for logits in answers.logits) if folded else 0.0
    if found.largest > allowed:
        raise IntegrityError(f"the written adapter differs from its source: {found.describe()}; nothing was kept")
    return found


def _serve(request: ExportRequest, base: str, revision: str | None, rank: int, more: list[str]) -> str:
    out = Path(request.options.out)
    name = re.sub(r"[^\w.-]+", "-", out.resolve().name)
    words = ["vllm", "serve", base, *(["--revision", revision] if revision else []), *more]
    largest = next(most for most in MAX_RANKS if most >= rank)
    words += ["--enable-lora", "--lora-modules", f"{name}={out}", "--max-lora-rank", str(largest)]
    if (request.out / "chat_template.jinja").is_file():
        # vLLM uses the base's tokenizer, which may have another template.
        words += ["--chat-template", str(out / "chat_template.jinja")]
    return shlex.join(words)
