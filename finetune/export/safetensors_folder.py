"""format=safetensors: a model folder for transformers and vLLM, rounded or quantized one tensor at a time.

The linear layers of the blocks are quantized; embedding, head, norms and biases stay bf16. nf4 has the bits that
bitsandbytes computes while it loads. int8 and fp8 are W8A8 and FP8_DYNAMIC of compressed-tensors: a scale for each row
of a weight, and one for each token's activations, which the server computes. A folder has one kind of quantized
layers. Layers that mixed precision stored in more bits stay bf16. A model with towers is written in 16 or 32 bit.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from finetune.config.schema import QuantConfig
from finetune.export.exporter import Exported, ExportRequest
from finetune.export.merge.merge import REPORT
from finetune.export.shards import Content, Planned, plan_shards, write_index, write_shard
from finetune.export.staging import MODEL_COPIES, copy_files
from finetune.export.verify import Reader, compare, open_model, read_settings, source_answers
from finetune.models.decoder import family_in
from finetune.models.families import FAMILIES, ModelFamily
from finetune.models.hub import named_in_model, read_config, weight_files
from finetune.models.quant.four_bit import quantize, quantizing_workers
from finetune.models.quant.quantize import head_name, linear_names, quantization_config
from finetune.models.safetensors_index import Stored, WeightFiles, read_rows, read_tensor
from finetune.models.skeleton import build_skeleton
from finetune.models.tokenizer import quiet
from finetune.system.atomic import write_text
from finetune.system.errors import ConfigError, IntegrityError, MissingExtra
from finetune.system.format import parse_size

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_BLOCK_ELEMENTS = 1 << 22  # rounded at once
_ALIGNMENT = 16


@dataclass(frozen=True)
class Storage:
    """The storage of a number type."""

    dtype: torch.dtype  # of everything that is not quantized
    # A weight [out, in] -> the stored tensors, by the part of their name after the layer's.
    quantize: Callable[[Tensor], dict[str, Tensor]] | None = None
    settings: dict[str, Any] | None = None  # quantization_config of config.json


def check_libraries(kind: str) -> None:
    """Raise MissingExtra if the library of a number type is missing."""
    TYPES[kind](["lm_head"])


def write(request: ExportRequest) -> Exported:
    """Write a complete transformers folder in a number type.

    Raises:
        ConfigError: the source is quantized, or a value exceeds fp16.
        IntegrityError: transformers does not read back what was written.
    """
    kind = request.kind
    config = dict(read_config(request.source, str(request.source)))
    family = FAMILIES[config["model_type"]]
    skeleton = build_skeleton(request.source, torch.bfloat16, "eager")
    head = head_name(skeleton)
    # Layers that the run of a merged adapter stored in more bits than this type.
    more = {} if kind in PLAIN else read_settings(request.source, REPORT).get("kept", {})
    kept = sorted([*more.get("none", []), *(more.get("int8", []) if kind == "nf4" else [])])
    towers = tuple(f"{tower.module}." for tower in family_in(skeleton).towers.values())
    of_towers = [n for n, module in skeleton.named_modules() if isinstance(module, nn.Linear) and n.startswith(towers)]
    storage = TYPES[kind]([head, *kept, *of_towers])
    blocks = [name for name in linear_names(skeleton) if name not in {head, *kept}]
    in_files = named_in_model(weight_files(request.source, str(request.source)), family)
    lost = sorted({f"{name}.weight" for name in blocks} - in_files.keys())
    if lost:
        raise IntegrityError(f"{request.source}: tensors of its config.json are missing: {', '.join(lost[:5])}")
    quantized = [in_files[f"{name}.weight"].name for name in blocks] if storage.quantize else []
    lossless = _write_weights(request, storage, quantized, family)
    config.pop("torch_dtype", None)
    config["dtype"] = str(storage.dtype).removeprefix("torch.")
    if storage.settings is not None:
        config["quantization_config"] = storage.settings
    write_text(request.out / "config.json", json.dumps(config, indent=2) + "\n")
    copy_files(request.source, request.out, (*MODEL_COPIES, *family.companions))
    checks = []
    if request.options.verify:
        answers = source_answers(request.source, request.options)
        checks.append(compare(answers, transformers_reader(request.out), "transformers", exact=lossless))
    notes: dict[str, Any] = {
        "type": kind,
        "quantized_tensors": len(quantized),
        "bytes": sum(file.stat().st_size for file in request.out.glob("*.safetensors")),
    }
    if kept:
        notes["kept_in_bf16"] = kept
        request.log(
            f"safetensors: {len(kept)} layers stay bf16, since training stored them in more bits; vLLM merges q, k, v "
            "and gate, up, and needs the same storage for each group"
        )
    out = Path(request.options.out)
    serve = f"vllm serve {shlex.quote(str(out))} --served-model-name {shlex.quote(out.resolve().name)}"
    return Exported(checks, [serve], notes)


def _nf4(kept: Sequence[str]) -> Storage:
    settings: Any = quantization_config(QuantConfig(type="nf4"), dict.fromkeys(kept, "none"))
    import bitsandbytes as bnb

    # A layer as transformers builds it while it loads: its options decide the bits.
    like = bnb.nn.Linear4bit(
        1,
        1,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
        quant_storage=settings.bnb_4bit_quant_storage,
        device="meta",
    ).weight

    def store(weight: Tensor) -> dict[str, Tensor]:
        with quantizing_workers() as workers:
            packed, state = quantize(weight.to(torch.bfloat16), like, workers.map)
        return {"weight": packed, **{f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}}

    return Storage(torch.bfloat16, store, settings.to_dict())


def _compressed(preset: str, form: str, kept: Sequence[str]) -> Storage:
    """Return the storage of a scheme of compressed-tensors; form: its storage format."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
        from compressed_tensors.quantization.utils import calculate_qparams
    except ImportError as error:
        raise MissingExtra('types int8 and fp8 need: pip install "finetune-qlora[export]"') from error
    scheme: Any = preset_name_to_scheme(preset, ["Linear"])
    scheme.format = form
    compressor: Any = BaseCompressor.get_value_from_registry(form)

    def store(weight: Tensor) -> dict[str, Tensor]:
        weight_OI = weight.float()
        low_O1, high_O1 = weight_OI.aminmax(dim=1, keepdim=True)
        # Readers keep scales in the model's dtype, so the weight is divided by the rounded scale.
        scale_O1 = calculate_qparams(low_O1, high_O1, scheme.weights)[0].to(torch.bfloat16)
        stored = compressor.compress({"weight": weight_OI, "weight_scale": scale_O1.float()}, scheme)
        return {"weight": stored["weight"], "weight_scale": scale_O1}

    settings = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=list(kept)
    )
    # An older version refuses unknown entries of a newer one, so empty entries are left out.
    return Storage(torch.bfloat16, store, settings.model_dump(mode="json", exclude_none=True))


# Each gets the full names of the linear layers that stay bf16.
TYPES: dict[str, Callable[[Sequence[str]], Storage]] = {
    **{kind: lambda kept, dtype=dtype: Storage(dtype) for kind, dtype in PLAIN.items()},
    "nf4": _nf4,
    "int8": partial(_compressed, "W8A8", "int-quantized"),
    "fp8": partial(_compressed, "FP8_DYNAMIC", "float-quantized"),
}


def _write_weights(request: ExportRequest, storage: Storage, quantized: list[str], family: ModelFamily) -> bool:
    """Write all tensors in shards, and return whether every one kept its value.

    Parts that the family does not load, like a talker, keep their bytes.
    """
    limit_bytes = parse_size("shard_size", request.options.shard_size)
    files = weight_files(request.source, str(request.source))
    weights = WeightFiles(files)
    parts = {name: stored for name, stored in weights.tensors.items() if name not in set(quantized)}
    loaded = {name for name in parts if family.name_in_model(name) is not None}
    plan = [
        Planned(name, storage.dtype if name in loaded else stored.dtype, stored.shape) for name, stored in parts.items()
    ]
    scratch = request.out / ".quantized"
    if storage.quantize is not None:
        # The header of a file needs the sizes first, so quantized tensors wait in a scratch file.
        with scratch.open("wb") as stream:
            for name in quantized:
                layer = name.removesuffix("weight")
                for key, tensor in storage.quantize(read_tensor(files[name], name)).items():
                    parts[layer + key] = stored = _append(stream, scratch, tensor)
                    plan.append(Planned(layer + key, stored.dtype, stored.shape))
    shards = plan_shards(sorted(plan, key=lambda planned: planned.name), limit_bytes)

    def content(planned: Planned) -> Content:
        stored = parts[planned.name]
        return stored if stored.dtype == planned.dtype else _rounded(planned, stored)

    for file, members in shards.items():
        write_shard(request.out / file, members, content, lambda _: None)
    write_index(request.out, shards)
    scratch.unlink(missing_ok=True)
    weights.check_unchanged()
    wider = {stored.dtype for name, stored in parts.items() if name in loaded} - {storage.dtype}
    return not quantized and (storage.dtype == torch.float32 or not wider) and torch.float64 not in wider


def _append(stream: IO[bytes], file: Path, tensor: Tensor) -> Stored:
    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
    stored = Stored(file, stream.tell(), tensor.dtype, tuple(tensor.shape))
    stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return stored


def _rounded(planned: Planned, stored: Stored) -> Iterator[Tensor]:
    rows = stored.shape[0]
    step = max(1, _BLOCK_ELEMENTS * rows // max(1, stored.nbytes // stored.dtype.itemsize))
    for start in range(0, rows, step):
        block = read_rows(stored, start, min(start + step, rows))
        rounded = block.to(planned.dtype)
        if rounded.isinf().any():
            raise ConfigError(
                f"{stored.file}: {planned.name} exceeds {torch.finfo(planned.dtype).max:.3g}, the largest value of "
                f"{planned.dtype}, found {block.abs().max():.3g}\nhelp: use type=bf16 or type=fp32"
            )
        yield rounded


def transformers_reader(folder: Path) -> Reader:
    """Load a folder in plain transformers, and return a reader in fp32 as far as its layers allow.

    Raises:
        IntegrityError: tensors are missing or unexpected.
    """
    with _silent():
        model, report = open_model(folder, output_loading_info=True)
    family = family_in(model)
    report["unexpected_keys"] = [name for name in report["unexpected_keys"] if family.name_in_model(name) is not None]
    if wrong := {kind: sorted(map(str, names))[:5] for kind, names in report.items() if names}:
        raise IntegrityError(f"{folder}: transformers expects other tensors, found {wrong}; nothing was kept")
    # In a model with 4-bit layers, transformers keeps the stored dtype of other layers, except a tied embedding.
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.to(model.get_input_embeddings().weight.dtype)
    model.eval()

    def read(ids: list[int]) -> Tensor:
        with _silent():
            return model(torch.tensor([ids])).logits[0].float()

    return read


@contextmanager
def _silent() -> Iterator[None]:
    """Hide the progress bars of compressed-tensors, which has no option for it."""
    with quiet(), redirect_stderr(io.StringIO()):
        yield
