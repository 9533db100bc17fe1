"""The interface of an export format, and the table of formats.

To add a format, write a module with two functions and add an entry to EXPORTERS:
`check_libraries(kind)` raises MissingExtra without the libraries that write this number type;
`write(request)` fills `request.out`, reads it back, compares it with the source and returns `Exported`. It raises
ConfigError if the format cannot represent the source, IntegrityError if the export computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from finetune.config.command_options import ExportOptions
from finetune.export.gguf.quantizer import QUANTIZER_TYPES, find_quantizer
from finetune.models.adapters.folder import CONFIG_FILE, TENSOR_FILE, find_adapter, read_adapter_config
from finetune.models.families import FAMILIES, shape_of
from finetune.models.hub import (
    TEXT_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    fetch,
    find_texts,
    read_config,
    weight_files,
)
from finetune.system.atomic import refuse_existing
from finetune.system.console import Log
from finetune.system.errors import ConfigError

if TYPE_CHECKING:
    from finetune.export.verify import Verification

# The formats spell the same types differently; each spelling is accepted.
_SPELLINGS = (
    {"bf16", "bfloat16"},
    {"fp16", "f16", "float16"},
    {"fp32", "f32", "float32"},
    *({f"{name}_k", f"{name}_k_m"} for name in ("q3", "q4", "q5")),  # as in llama.cpp
)


@dataclass(frozen=True)
class ExportRequest:
    """The input of an exporter."""

    source: Path  # a model folder (safetensors, config, tokenizer, template), or that of an adapter; read-only
    out: Path  # an empty folder to fill; it is renamed to `options.out` after the comparison
    options: ExportOptions
    log: Log

    @property
    def kind(self) -> str:
        """The number type, in the format's own spelling."""
        return EXPORTERS[self.options.format].number_type(self.options)

    @property
    def final_folder(self) -> Path:
        """The folder that `out` is renamed to."""
        return Path(self.options.out).expanduser()


@dataclass(frozen=True)
class Exported:
    """The result of an exporter."""

    checks: list[Verification]  # one comparison with the source for each reader
    serve: list[str]  # commands that use the export
    notes: dict[str, Any] = field(default_factory=dict)  # facts for export_report.json


@dataclass(frozen=True)
class Exporter:
    """One export format."""

    module: str  # its address
    summary: str  # its line of `finetune export --help`
    types: Mapping[str, float]  # number types with the bytes of a weight on the disk during the export, default first
    adapter_types: tuple[str, ...] = ()  # of an adapter alone (merge=false); none if the format cannot hold one
    merges: bool = True  # False for a format of adapters only
    advice: str = "set type to one of these"  # for a number type that the format does not have
    tower_types: tuple[str, ...] = ()  # number types of a model with towers, read back with them; none if no reader is

    def number_type(self, options: ExportOptions) -> str:
        """Return `options.type` in the format's own spelling, or the default; raise ConfigError for an unknown one."""
        known = tuple(self.types) if options.merge and self.merges else self.adapter_types
        wanted = options.type and options.type.lower()
        spellings = next((names for names in _SPELLINGS if wanted in names), {wanted})
        for name in known:
            if options.type is None or name in spellings:
                return name
        raise ConfigError(
            f"type: format={options.format} writes {', '.join(known)}, found {options.type}\nhelp: {self.advice}"
        )


# GGUF's types below 8 bits keep the embedding in 8 bits.
_GGUF_TYPES = {"q8_0": 1.1, "f32": 4, "f16": 2, "bf16": 2, "q5_1": 1.1, "q5_0": 1.1, "q4_1": 1.1, "q4_0": 1.1}
# An f32 file, and up to two quantized ones with the embedding in 6 bits.
_GGUF_TYPES |= dict.fromkeys(QUANTIZER_TYPES, 5.7)
EXPORTERS = {
    "safetensors": Exporter(
        "finetune.export.safetensors_folder",
        "a transformers folder; nf4, int8 and fp8 are for servers",
        types={"bf16": 2, "fp16": 2.1, "fp32": 4.1, "nf4": 1.3, "int8": 2.2, "fp8": 2.2},
        tower_types=("bf16", "fp16", "fp32"),
    ),
    "adapter": Exporter(
        "finetune.export.adapter_folder",
        "the adapter alone, for servers that load adapters over a base",
        types={"unchanged": 4.1},
        adapter_types=("unchanged",),
        tower_types=("unchanged",),
        merges=False,
        advice="remove it: the adapter keeps its own values",
    ),
    "gguf": Exporter(
        "finetune.export.gguf.model",
        "one file for llama.cpp; merge=false writes a GGUF LoRA: f32 f16 bf16 q8_0",
        types=_GGUF_TYPES,
        adapter_types=("f32", "f16", "bf16", "q8_0"),
    ),
    "ollama": Exporter(
        "finetune.export.gguf.ollama",
        "a GGUF file with a Modelfile",
        types=_GGUF_TYPES,
    ),
    "onnx": Exporter(
        "finetune.export.onnx.model",
        "a graph with its key-value cache, for onnxruntime-genai",
        types={"fp32": 4.1, "fp16": 2.1, "int8": 2.2, "int4": 1.7, "int8-dynamic": 7.6},
    ),
}


def formats_help() -> str:
    """Return the lines of --help about the formats and their number types."""
    lines = []
    for name, exporter in EXPORTERS.items():
        lines.append(f"  {name:<13} {exporter.summary}")
        if exporter.merges:
            lines += wrap(f"type={' '.join(exporter.types)}", 120, initial_indent=" " * 16, subsequent_indent=" " * 21)
    return "\n".join(lines)


def check_export(options: ExportOptions) -> None:
    """Check the options and the files that they name, before torch is imported.

    Raises: ConfigError, or IntegrityError for a corrupt file of weights.
    """
    exporter = find_exporter(options)
    kind = exporter.number_type(options)
    if kind in QUANTIZER_TYPES:
        find_quantizer(kind, options.imatrix is not None)
    if options.imatrix is not None:
        # The readers of rows load numpy, which the help of the command does not need.
        from finetune.data.early_checks import check_source
        from finetune.data.sources.paths import check_each

        check_each({"imatrix": options.imatrix}, check_source)
    refuse_existing(Path(options.out).expanduser())
    if options.adapter is not None:
        find_adapter(options.adapter, "adapter")
    elif find_texts(str(options.model), None, "model").revision is None:  # a local folder
        find_model(str(options.model))
    check_towers(exporter, options)


def check_towers(exporter: Exporter, options: ExportOptions) -> None:
    """Raise ConfigError if the source has towers, and no reader opens them in this format and number type."""
    kind, base = exporter.number_type(options), options.model
    if kind in exporter.tower_types:
        return
    if base is None:
        settings = read_adapter_config(find_adapter(str(options.adapter), "adapter"), f"adapter={options.adapter}")
        base = settings.get("base_model_name_or_path") or ""
    shape = shape_of(base) if base else None
    if shape is not None and (family := FAMILIES[shape["model_type"]]).towers:
        found, advice = f"format={options.format}", "use format=safetensors"
        if exporter.tower_types:
            found = f"type={kind}"
            advice = f"use type={' or '.join(exporter.tower_types)}; vllm serve --quantization fp8 rounds at loading"
        raise ConfigError(
            f"{found}: no reader here opens {family.title} with its towers in it, so it could not be compared with its "
            f"source\nhelp: {advice}"
        )


def find_exporter(options: ExportOptions) -> Exporter:
    """Return the exporter of the format. Raises: ConfigError if there is none, or it does not take the options."""
    exporter = EXPORTERS.get(options.format)
    if exporter is None:
        raise ConfigError(f"format: unknown format, found {options.format}\nhelp: choose from {', '.join(EXPORTERS)}")
    merges = options.merge and exporter.merges
    problems = []
    if options.adapter is None and options.model is None:
        problems.append("adapter: is missing; give adapter=RUN_OR_ADAPTER, or model=FOLDER for a merged model")
    elif options.adapter is None and not merges:
        problems.append(f"adapter: is missing; format={options.format} writes the adapter itself")
    if not merges and not exporter.adapter_types:
        holds = [name for name, other in EXPORTERS.items() if other.adapter_types]
        problems.append(f"merge=false: format={options.format} cannot hold an adapter; use format={' or '.join(holds)}")
    if not merges and options.base != "auto":
        problems.append(f"base={options.base}: nothing is merged here; remove it")
    if problems:
        raise ConfigError("\n".join(problems))
    _check_imatrix(exporter.number_type(options), options)
    _check_kl_check(merges and options.adapter is not None, options)
    return exporter


def _check_kl_check(merges: bool, options: ExportOptions) -> None:
    """Refuse settings of the comparison that nothing reads; num_examples=0 asks for no comparison."""
    read = {"data", "num_examples", "max_kl"} if merges else {"data", "num_examples"} if options.imatrix else set()
    given = options.kl_check.model_dump(exclude_defaults=True)
    unread = [key for key in given if not (options.verify and key in read) and (key, given[key]) != ("num_examples", 0)]
    if unread:
        problems = [f"kl_check.{key}: nothing reads it in this export, found {given[key]}" for key in unread]
        help_line = "help: remove it; only a merge of adapter= compares (verify=true), or imatrix= without max_kl"
        raise ConfigError("\n".join([*problems, help_line]))


def _check_imatrix(kind: str, options: ExportOptions) -> None:
    if options.imatrix is not None and kind not in QUANTIZER_TYPES:
        raise ConfigError(
            f"imatrix: type={kind} rounds every value to the nearest, so importance changes nothing\n"
            f"help: remove it, or use format=gguf with {', '.join(QUANTIZER_TYPES)}"
        )
    if options.imatrix is None and QUANTIZER_TYPES.get(kind):
        raise ConfigError(f"imatrix: is missing; type={kind} needs it\nhelp: pass imatrix=rows.jsonl")


def find_model(name: str) -> Path:
    """Return the folder of a complete model, downloaded if `name` is a hub id. Raises: ConfigError, IntegrityError."""
    folder = fetch(name, None, TEXT_FILES + WEIGHT_FILES, "model").folder
    if all((folder / file).is_file() for file in (CONFIG_FILE, TENSOR_FILE)):
        raise ConfigError(f"model={name}: is an adapter\nhelp: write adapter={name}")
    read_config(folder, name)
    weight_files(folder, name)
    if missing := [file for file in TOKENIZER_FILES if not (folder / file).is_file()]:
        raise ConfigError(f"model={name}: an export needs the tokenizer's files; {', '.join(missing)} is missing")
    return folder
