"""What can be written, by format; each is one function from a model folder to files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.command_options import ExportOptions
from finetune.export.verify import Verification
from finetune.system.console import Log


@dataclass(frozen=True)
class ExportRequest:
    """What an exporter gets.

    source: a plain model folder (safetensors, config, tokenizer, chat template), never written to; for
    `merge=false` and format=adapter the adapter's folder. out: an empty folder to fill; it is put in place when all is
    well. options: as typed. say: a line to the user.
    """

    source: Path
    out: Path
    options: ExportOptions
    log: Log


@dataclass(frozen=True)
class Exported:
    """checks: what its reader found. serve: commands that use it. notes: facts for the report."""

    checks: list[Verification]
    serve: list[str]
    notes: dict[str, Any] = field(default_factory=dict)
