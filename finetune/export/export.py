"""Run one export: prepare the source, write, read back, put in place."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.config.command_options import ExportOptions, KlCheckOptions, MergedType, MergeOptions
from finetune.export.exporter import Exported, Exporter, ExportRequest, check_towers, find_exporter, find_model
from finetune.export.merge.merge import Progress, merge
from finetune.export.staging import check_room, scratch, staged
from finetune.models.adapters.files import fetch_adapter
from finetune.models.safetensors_header import read_header
from finetune.system.console import Log, log, progress_bar

REPORT = "export_report.json"
# The merge rounds to a 16-bit type of the format. For all other types it keeps fp32, and the exporter rounds.
_MERGE_DTYPES: dict[str, MergedType] = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "nf4": "bfloat16"}


def export_model(options: ExportOptions, log: Log = log, progress: Progress = progress_bar) -> Exported:
    """Write an adapter or a model in another format, and compare what was written with its source.

    Args:
        options: the keys of `finetune export`: adapter or model, format, number type, the new folder.
        log: receives each line about the export.
        progress: opens a progress bar over bytes, for the merge.

    Returns:
        The comparisons with the source, commands that serve the export, and facts for its report.

    Raises:
        ConfigError: the folder exists, the source is missing, or options contradict each other.
        MissingExtra: a library of the format is not installed; the message has the command.
        ResourceError: the disk or the memory is too small.
        IntegrityError: the export does not compute what its source computes; nothing is kept.
    """
    exporter = find_exporter(options)
    kind = exporter.number_type(options)
    module = importlib.import_module(exporter.module)
    module.check_libraries(kind)
    check_towers(exporter, options)
    out = Path(options.out).expanduser()
    # `staged` comes first: it refuses an existing folder before a merge of an hour.
    with staged(out, 0) as folder, _source(exporter, options, out, log, progress) as (source, kl_checks):
        entries = [entry for file in source.glob("*.safetensors") for entry in read_header(file)[1].values()]
        weights = sum(math.prod(entry["shape"]) for entry in entries)
        check_room(folder, out, round(weights * exporter.types[kind]))
        exported = module.write(ExportRequest(source, folder, options, log))
        for check in exported.checks:
            log(check.describe())
        report = {
            "source": options.adapter or options.model,
            "format": options.format,
            "type": options.type,
            "checks": [asdict(check) for check in exported.checks],
            "kl_checks": kl_checks,
            **exported.notes,
        }
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return exported


@contextmanager
def _source(
    exporter: Exporter, options: ExportOptions, out: Path, log: Log, progress: Progress
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Yield the folder to export, and the KL checks of the merge if there was one."""
    if options.adapter is None:
        yield find_model(str(options.model)), []
    elif not (exporter.merges and options.merge):
        yield fetch_adapter(options.adapter, "adapter").folder, []
    else:
        with scratch(out) as folder:
            chosen = MergeOptions(
                adapter=options.adapter,
                out=str(folder / "model"),
                model=options.model,
                base=options.base,
                dtype=_MERGE_DTYPES.get(exporter.number_type(options), "float32"),
                kl_check=options.kl_check if options.verify else KlCheckOptions(num_examples=0),
            )
            report = merge(chosen, log, progress)
            yield folder / "model", [asdict(check) for check in report.kl_checks]
