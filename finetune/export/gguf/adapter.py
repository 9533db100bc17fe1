"""format=gguf merge=false: a LoRA adapter as a GGUF file, which llama.cpp adds to a base while it runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from finetune.export.exporter import Exported, ExportRequest
from finetune.export.gguf.file import (
    PlannedTensor,
    check_file,
    file_name,
    final_folder,
    model_name,
    types_used,
    write_file,
)
from finetune.export.gguf.names import ARCHITECTURE, linear_name
from finetune.export.gguf.types import NumberType, fitting_type, gguf_package, number_type
from finetune.models.adapters.config import other_base, other_updates, scaling_of
from finetune.models.adapters.files import PREFIX, SavedAdapter, fetch_adapter, token_ids
from finetune.system.errors import ConfigError

TYPES = ("f32", "f16", "bf16", "q8_0")
# What only a merged model can say.
_MERGED_ONLY = ("use_dora", "modules_to_save")


def adapter_to_gguf(request: ExportRequest) -> Exported:
    """Writes `<name>-<type>.gguf` into job.out from the PEFT adapter in job.source.

    `options.type`: one of TYPES, f32 if none is given, which keeps every bit of an ordinary adapter.
    llama.cpp scales by alpha / rank. Where PEFT scales otherwise (rsLoRA, alpha_pattern), the quotient of the two is
    multiplied into B, in fp32.
    Raises: ConfigError naming everything of the adapter that such a file cannot say; IntegrityError if the adapter is
    broken or was written wrongly.
    """
    kind = number_type(request.options.type or "f32", TYPES)
    adapter = fetch_adapter(str(request.source), "adapter")
    if problems := list(_unsayable(adapter)):
        listed = "\n  ".join(problems)
        raise ConfigError(f"adapter={adapter.name} cannot be a GGUF adapter; merge it (merge=true):\n  {listed}")
    alpha = float(adapter.config.get("lora_alpha", 8)) or 1.0  # 0 would mean: do not scale
    tensors = list(_plan(adapter, alpha, kind))
    path = request.out / file_name(request, kind)
    entries = write_file(path, _writer(request, adapter, alpha, kind), tensors)
    if request.options.verify:
        check_file(path, entries, tensors)
    size = path.stat().st_size
    request.log(f"{path.name}: {size / 1e6:,.1f} MB, {len(tensors) // 2} adapted matrices")
    final = shlex.quote(str(final_folder(request) / path.name))
    notes = {"file": path.name, "bytes": size, "type": kind.name, "alpha": alpha, "tensors": types_used(tensors)}
    return Exported([], [f"llama-server -m BASE.gguf --lora {final}"], notes)


def _writer(request: ExportRequest, adapter: SavedAdapter, alpha: float, kind: NumberType) -> Any:
    gguf = gguf_package()
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_name(model_name(request))
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_file_type(gguf.LlamaFileType[kind.file_type or f"MOSTLY_{kind.name.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if base := adapter.config.get("base_model_name_or_path"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, str(base).rstrip("/").rpartition("/")[2])
    return writer


def _plan(adapter: SavedAdapter, alpha: float, kind: NumberType) -> Iterator[PlannedTensor]:
    for name, lora_A in adapter.tensors.items():
        if ".lora_A." not in name:
            continue
        module, name_B = _module(name), name.replace(".lora_A.", ".lora_B.")
        factor = scaling_of(adapter.config, module, len(lora_A)) * len(lora_A) / alpha
        lora_B = adapter.tensors[name_B]
        yield _planned(f"{linear_name(module)}.lora_a", name, lora_A, kind)
        yield _planned(
            f"{linear_name(module)}.lora_b", name_B, lora_B if factor == 1 else lora_B.float() * factor, kind
        )


def _planned(name: str, source: str, tensor: Tensor, kind: NumberType) -> PlannedTensor:
    shape = tuple(tensor.shape)
    return PlannedTensor(name, source, shape, fitting_type(kind, shape, False), lambda start, stop: tensor[start:stop])


def _module(name: str) -> str:
    return name.removeprefix(PREFIX).partition(".lora_")[0]


def _unsayable(adapter: SavedAdapter) -> Iterator[str]:
    config = adapter.config
    for key in _MERGED_ONLY:
        if config.get(key):
            yield f"{key}={config[key]}"
    yield from other_updates(config)
    if init := other_base(config):
        yield f"init_lora_weights={init}: it belongs on other weights than those of the base it names"
    if ids := token_ids(config):
        yield f"new tokens: {sum(map(len, ids.values()))} trained rows of {', '.join(sorted(ids))}"
    if (bias := config.get("bias", "none")) != "none":
        yield f"bias={bias}: trained biases"
    strange = {
        _module(name)
        for name in adapter.tensors
        if not name.endswith((".lora_A.weight", ".lora_B.weight")) or linear_name(_module(name)) is None
    }
    if strange:
        shown = ", ".join(sorted(strange)[:5]) + (", …" if len(strange) > 5 else "")
        yield f"tensors that are no LoRA of a linear layer in a block: {shown}"
