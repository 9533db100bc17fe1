"""A run's data in figures, and some of its rows, as a file in the run's folder that a report is drawn from later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from finetune.config.schema import RunConfig
from finetune.data.loader import LoadedData
from finetune.data.template.chat import ChatTemplate
from finetune.report.dataset.examples import Decoder, ShownRow, shown_rows
from finetune.report.dataset.statistics import Report, build_report
from finetune.system.atomic import write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA = "data.json"


@dataclass(frozen=True)
class StoredReport:
    """What `finetune data` tells; rows: some training rows as the model sees them."""

    report: Report
    rows: tuple[ShownRow, ...]


def store_report(
    folder: Path, data: LoadedData, cfg: RunConfig, chat: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write data.json into a run's folder, with one training row. Rows that are streamed are not known yet: no file."""
    if not data.train:
        return
    rows = shown_rows([source.name for source in data.train], data.documents, Decoder.of(tokenizer), 1)
    stored = StoredReport(build_report(data, cfg, chat), tuple(rows))
    write_bytes(folder / DATA, TypeAdapter(StoredReport).dump_json(stored, indent=1) + b"\n")


def read_stored(file: Path) -> StoredReport:
    """Raises: OSError, ValueError if it cannot be read or is not what this version writes."""
    return TypeAdapter(StoredReport).validate_json(file.read_bytes())
