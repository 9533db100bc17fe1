"""Write the report on a dataset: its page, data.json in a run's folder, and tokenized rows for other programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter

from finetune.config.schema import RunConfig
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.loader import LoadedData
from finetune.data.template.chat import ChatTemplate
from finetune.report.dataset.advice import Advice
from finetune.report.dataset.examples import Decoder, ShownRow, shown_rows
from finetune.report.dataset.statistics import Report, build_report
from finetune.report.dataset.terminal import describe_order, describe_part, describe_template
from finetune.report.environment import render_page
from finetune.system.atomic import write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA = "data.json"


@dataclass(frozen=True)
class StoredReport:
    """The report on a dataset, and some training examples as the model sees them."""

    report: Report
    rows: tuple[ShownRow, ...]


def write_page(stream: IO[str], report: Report, advice: Sequence[Advice], rows: Sequence[ShownRow]) -> None:
    """Write the whole page; it refers to no other file and no address."""
    page = render_page(
        "dataset.html",
        title=f"{report.name}: data report",
        report=report,
        advice=advice,
        rows=rows,
        template=describe_template(report),
        order=describe_order(report.order),
        describe=describe_part,
    )
    stream.write(page)


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


def write_dump(stream: IO[str], data: LoadedData) -> None:
    """Write every document of data.train, then of data.eval, as one JSON object per line; labels are not shifted."""
    for source in (*data.train, *data.eval):
        name, documents = source.config.name or source.config.path, source.documents
        for store, row, piece in map(documents.piece, range(len(documents))):
            labels = np.where(piece.weights > 0, piece.ids, IGNORE_INDEX).tolist()
            index = int(store.indices[row])  # from 0 in the source
            content = {"source": name, "row": index, "input_ids": piece.ids.tolist(), "labels": labels}
            if piece.chosen_tokens is not None:
                content["chosen_tokens"] = piece.chosen_tokens
            stream.write(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
