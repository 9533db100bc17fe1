"""format=gguf merge=false: a LoRA adapter as a GGUF file, which llama.cpp adds to a base at run time."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from finetune.export.adapter_folder import merge_reasons
from finetune.export.exporter import Exported, ExportRequest
from finetune.export.gguf.file import PlannedTensor, start_writer, write_file
from finetune.export.gguf.qwen2 import linear_name
from finetune.export.gguf.types import TYPES, storage_type
from finetune.models.adapters.files import SavedAdapter, fetch_adapter, scaling_of
from finetune.models.adapters.names import PREFIX
from finetune.system.errors import ConfigError


def write_adapter(request: ExportRequest) -> Exported:
    """Write `NAME-TYPE.gguf` from the PEFT adapter in `request.source`.

    f32 keeps every bit of an ordinary adapter. llama.cpp scales by alpha / rank. If PEFT scales otherwise (rsLoRA,
    alpha_pattern), the quotient is multiplied into B in fp32.

    Raises:
        ConfigError: lists everything of the adapter that the file cannot hold.
        IntegrityError: the adapter is corrupt, or the file was not written correctly.
    """
    adapter = fetch_adapter(str(request.source), "adapter")
    if problems := list(_obstacles(adapter)):
        listed = "\n  ".join(problems)
        raise ConfigError(f"adapter={adapter.name}: cannot be a GGUF adapter:\n  {listed}\nhelp: use merge=true")
    alpha = float(adapter.config.get("lora_alpha", 8)) or 1.0  # llama.cpp reads 0 as: do not scale.
    tensors = []
    for name_A, lora_A in adapter.tensors.items():
        if ".lora_A." not in name_A:
            continue
        module, name_B = _module(name_A), name_A.replace(".lora_A.", ".lora_B.")
        factor = scaling_of(adapter.config, module, len(lora_A)) * len(lora_A) / alpha
        lora_B = adapter.tensors[name_B]
        scaled_B = lora_B if factor == 1 else lora_B.float() * factor
        for end, source, tensor in (("a", name_A, lora_A), ("b", name_B, scaled_B)):
            tensors.append(
                PlannedTensor(
                    f"{linear_name(module)}.lora_{end}",
                    source,
                    tuple(tensor.shape),
                    storage_type(TYPES[request.kind], tuple(tensor.shape), vocabulary=False),
                    lambda start, stop, tensor=tensor: tensor[start:stop],
                )
            )
    writer = start_writer(request, "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if base := adapter.config.get("base_model_name_or_path"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, str(base).rstrip("/").rpartition("/")[2])
    path, notes = write_file(request, writer, tensors)
    final = shlex.quote(str(request.final_folder / path.name))
    return Exported([], [f"llama-server -m BASE.gguf --lora {final}"], {**notes, "alpha": alpha})


def _module(name: str) -> str:
    return name.removeprefix(PREFIX).partition(".lora_")[0]


def _obstacles(adapter: SavedAdapter) -> Iterator[str]:
    """Yield the reasons why a GGUF file cannot hold the adapter."""
    yield from merge_reasons(adapter.config)
    other = {
        _module(name)
        for name in adapter.tensors
        if not name.endswith((".lora_A.weight", ".lora_B.weight")) or linear_name(_module(name)) is None
    }
    if other:
        shown = ", ".join(sorted(other)[:5]) + (", …" if len(other) > 5 else "")
        yield f"tensors that are not LoRA of a linear layer in a block: {shown}"
