"""One export from its options to a folder that was read back: find the source, write, verify, put in place."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.command_options import ExportOptions, KlCheckOptions, MergedType, MergeOptions
from finetune.export.exporter import Exported, ExportRequest, Log
from finetune.export.merge.merge import Progress, merge
from finetune.export.staging import check_room, scratch, staged
from finetune.models.adapters.files import CONFIG_FILE, TENSOR_FILE, fetch_adapter
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch, read_config, weight_files
from finetune.models.load import TOKENIZER_FILES
from finetune.models.safetensors_index import read_header
from finetune.system.console import log, progress_bar
from finetune.system.errors import ConfigError

REPORT = "export_report.json"


@dataclass(frozen=True)
class Format:
    """run: address of its exporter. ready: of the check of a type and of the libraries for it. default: its type where
    none is given. adapter_only: it never merges.
    """

    run: str
    ready: str
    default: str
    adapter_only: bool = False


# Imported when they run: each needs libraries that others do not have.
FORMATS = {
    "safetensors": Format(
        "finetune.export.safetensors_folder:to_safetensors", "finetune.export.safetensors_folder:check_ready", "bf16"
    ),
    "adapter": Format("finetune.export.adapter_folder:to_adapter", "", "fp32", adapter_only=True),
    "gguf": Format("finetune.export.gguf.model:to_gguf", "finetune.export.gguf.types:check_ready", "q8_0"),
    "ollama": Format("finetune.export.gguf.ollama:to_ollama", "finetune.export.gguf.types:check_ready", "q8_0"),
    "onnx": Format("finetune.export.onnx.model:to_onnx", "finetune.export.onnx.model:check_ready", "fp32"),
}
_NARROW: dict[str, MergedType] = {"bf16": "bf16", "fp16": "fp16", "f16": "fp16", "nf4": "bf16"}
# Scratch files included; GGUF's types of less than 8 bits keep the embedding in 8.
_BYTES_A_NUMBER = {
    "f32": 4,
    "fp32": 4.1,
    "f16": 2,
    "fp16": 2.1,
    "bf16": 2,
    "int8": 2.2,
    "fp8": 2.2,
    "nf4": 1.3,
    "int4": 1.7,
    "int8-dynamic": 7.6,
}


def export_model(options: ExportOptions, log: Log = log, progress: Progress = progress_bar) -> Exported:
    """Write an adapter or a model in another format.

    Raises: ConfigError, MissingExtra; IntegrityError if what was written does not read back as its source.
    """
    _check(options)
    out = Path(options.out).expanduser()
    # What is in the way, or has no place, is said before an hour's merging.
    with staged(out, 0) as folder, _source(options, out, log, progress) as (source, kl_checks):
        check_room(folder, out, _room(source, options))
        exported: Exported = _load(FORMATS[options.format].run)(ExportRequest(source, folder, options, log))
        for check in exported.checks:
            log(check.describe())
        report = {
            "source": options.adapter or options.model,
            "format": options.format,
            "type": options.type,
            "checks": [check.as_dict() for check in exported.checks],
            "kl_checks": kl_checks,
            **exported.notes,
        }
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return exported


def _check(options: ExportOptions) -> None:
    problems = []
    takes_adapter = FORMATS[options.format].adapter_only or not options.merge
    if options.adapter is None and options.model is None:
        problems.append("give adapter=RUN_OR_ADAPTER, or model=FOLDER for a model that is merged already")
    elif options.adapter is None and takes_adapter:
        problems.append(f"format={options.format} needs adapter=: what it writes is the adapter itself")
    if not options.merge and options.format not in ("gguf", "adapter"):
        problems.append(f"merge=false is for format=gguf: an adapter cannot stand alone as {options.format}")
    if takes_adapter and options.base != "auto":
        problems.append("base= is for merging, and nothing is merged here")
    if problems:
        raise ConfigError("\n".join(problems))
    if not takes_adapter:
        _load(FORMATS[options.format].ready)(options.type or FORMATS[options.format].default)


def _load(address: str) -> Callable[..., Any]:
    module, _, name = address.partition(":")
    return getattr(importlib.import_module(module), name)


@contextmanager
def _source(
    options: ExportOptions, out: Path, log: Log, progress: Progress
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """The folder to export, and how far it is from what was trained where it was merged for this."""
    if options.adapter is None:
        assert options.model is not None
        yield _plain_model(options.model), []
    elif FORMATS[options.format].adapter_only or not options.merge:
        yield fetch_adapter(options.adapter, "adapter").folder, []
    else:
        with scratch(out, "merged") as folder:
            merged = folder / "model"
            found = merge(_merging(options, merged), log, progress)
            yield merged, [check.as_dict() for check in found.kl_checks]


def _merging(options: ExportOptions, merged: Path) -> MergeOptions:
    """Rounded once: to what the format holds, or not at all where the format rounds."""
    assert options.adapter is not None
    kind = options.type or FORMATS[options.format].default
    return MergeOptions(
        adapter=options.adapter,
        out=str(merged),
        model=options.model,
        base=options.base,
        dtype=_NARROW.get(kind, "fp32"),
        kl_check=KlCheckOptions() if options.verify else KlCheckOptions(num_examples=0),
    )


def _plain_model(name: str) -> Path:
    folder = fetch(name, None, TEXT_FILES + WEIGHT_FILES, "model").folder
    if (folder / CONFIG_FILE).is_file() and (folder / TENSOR_FILE).is_file():
        raise ConfigError(f"model={name} is an adapter; write adapter={name}")
    read_config(folder, name)
    weight_files(folder, name)
    if missing := [file for file in TOKENIZER_FILES if not (folder / file).is_file()]:
        raise ConfigError(f"model={name} lacks {', '.join(missing)}: what is exported must know its tokens")
    return folder


def _room(source: Path, options: ExportOptions) -> int:
    """Bytes that the export may take while it is written."""
    entries = [entry for file in source.glob("*.safetensors") for entry in read_header(file)[1].values()]
    numbers = sum(math.prod(entry["shape"]) for entry in entries)
    kind = options.type or FORMATS[options.format].default
    return round(numbers * _BYTES_A_NUMBER.get(kind, 1.1))
