"""Keep the report on a run's data in its folder, for the run's page."""

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
    """The report on a dataset, and some training examples as the model sees them."""

    report: Report
    rows: tuple[ShownRow, ...]


def store_report(
    folder: Path, data: LoadedData, cfg: RunConfig, chat: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write data.json with one training example into a run's folder; no file for streamed rows, not yet known."""
    if data.train:
        rows = shown_rows([source.name for source in data.train], data.documents, Decoder.of(tokenizer), 1)
        stored = StoredReport(build_report(data, cfg, chat), tuple(rows))
        write_bytes(folder / DATA, TypeAdapter(StoredReport).dump_json(stored, indent=1) + b"\n")


def read_stored(file: Path) -> StoredReport:
    """Read data.json. Raises OSError, or ValueError for another content than this version writes."""
    return TypeAdapter(StoredReport).validate_json(file.read_bytes())
