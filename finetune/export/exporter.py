"""The interface of an export format, and the table of formats.

To add a format: write a module with `check_ready(options)` and `write(request)`, and add an entry to EXPORTERS.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.command_options import ExportOptions
from finetune.system.console import Log

if TYPE_CHECKING:
    from finetune.export.verify import Verification


# The formats spell the same types differently; each spelling is accepted.
_SPELLINGS = ({"bf16", "bfloat16"}, {"fp16", "f16", "float16"}, {"fp32", "f32", "float32"})


@dataclass(frozen=True)
class ExportRequest:
    """The input of an exporter.

    source: a model folder (safetensors, config, tokenizer, chat template); for an adapter, its folder. Read-only.
    out: an empty folder to fill; it is renamed to `options.out` after the comparison.
    """

    source: Path
    out: Path
    options: ExportOptions
    log: Log

    @property
    def final_folder(self) -> Path:
        """The folder that `out` is renamed to."""
        return Path(self.options.out).expanduser()


@dataclass(frozen=True)
class Exported:
    """The result of an exporter.

    checks: one comparison with the source for each reader.
    serve: commands that use the export.
    notes: facts for export_report.json.
    """

    checks: list[Verification]
    serve: list[str]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exporter:
    """One export format.

    module: address of its module, imported on use, since its libraries are optional.
    summary: its line of `finetune export --help`.
    reader: programs that read the export back and compute the answers that are compared with the source's.
    types: by number type, the bytes that a weight takes on the disk during the export; the first is the default.
    adapter_types: number types of an adapter alone (merge=false); none if the format cannot hold one.
    merges: False for a format of adapters only.
    extra: the extra of finetune-qlora with its libraries.
    """

    module: str
    summary: str
    reader: str
    types: Mapping[str, float]
    adapter_types: tuple[str, ...] = ()
    merges: bool = True
    extra: str | None = None

    def number_type(self, options: ExportOptions) -> str:
        """Return `options.type` in the format's own spelling, or the default."""
        if options.type is None:
            return next(iter(self.types)) if options.merge and self.merges else self.adapter_types[0]
        spellings = next((names for names in _SPELLINGS if options.type in names), ())
        return next((name for name in spellings if name in self.types), options.type)

    def check_ready(self, options: ExportOptions) -> None:
        """Raise ConfigError for options that the format does not take, MissingExtra without its libraries."""
        importlib.import_module(self.module).check_ready(options)

    def write(self, request: ExportRequest) -> Exported:
        """Fill `request.out`, read it back, and compare it with the source.

        Raises:
            ConfigError: the format cannot represent the source.
            IntegrityError: the source is corrupt, or the export does not compute what its source computes.
        """
        return importlib.import_module(self.module).write(request)


# GGUF's types below 8 bits keep the embedding in 8 bits.
_GGUF_TYPES = {"q8_0": 1.1, "f32": 4, "f16": 2, "bf16": 2, "q5_1": 1.1, "q5_0": 1.1, "q4_1": 1.1, "q4_0": 1.1}
EXPORTERS = {
    "safetensors": Exporter(
        "finetune.export.safetensors_folder",
        "a transformers folder; nf4, int8 and fp8 are for servers",
        reader="transformers",
        types={"bf16": 2, "fp16": 2.1, "fp32": 4.1, "nf4": 1.3, "int8": 2.2, "fp8": 2.2},
        extra="serve",
    ),
    "adapter": Exporter(
        "finetune.export.adapter_folder",
        "the adapter alone, for servers that load adapters over a base",
        reader="PEFT",
        types={"fp32": 4.1},
        adapter_types=("fp32",),
        merges=False,
    ),
    "gguf": Exporter(
        "finetune.export.gguf.model",
        "one file for llama.cpp; merge=false writes a GGUF LoRA: f32 f16 bf16 q8_0",
        reader="transformers, llama.cpp",
        types=_GGUF_TYPES,
        adapter_types=("f32", "f16", "bf16", "q8_0"),
        extra="gguf",
    ),
    "ollama": Exporter(
        "finetune.export.gguf.ollama",
        "a GGUF file with a Modelfile",
        reader="transformers, llama.cpp",
        types=_GGUF_TYPES,
        extra="gguf",
    ),
    "onnx": Exporter(
        "finetune.export.onnx.model",
        "a graph with its key-value cache, for onnxruntime-genai",
        reader="onnxruntime-genai",
        types={"fp32": 4.1, "fp16": 2.1, "int8": 2.2, "int4": 1.7, "int8-dynamic": 7.6},
        extra="onnx",
    ),
}


def formats_help() -> str:
    """Return the lines of --help about the formats and their number types."""
    lines = []
    for name, exporter in EXPORTERS.items():
        lines.append(f"  {name:<13} {exporter.summary}")
        if exporter.merges:
            lines.append(f"  {'':<13} type={' '.join(exporter.types)}")
    return "\n".join(lines)
