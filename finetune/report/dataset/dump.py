"""Write tokenized rows for other programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from finetune.data.encoded import IGNORE_INDEX
from finetune.data.loader import LoadedData, Source


def write_dump(stream: IO[str], data: LoadedData) -> None:
    """Write every document of data.train, then of data.eval, as one JSON object per line."""
    for source in (*data.train, *data.eval):
        for row in _rows(source):
            stream.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def _rows(source: Source) -> Iterator[dict[str, Any]]:
    # Labels are not shifted; rows count from 0 in the source.
    name, documents = source.config.name or source.config.path, source.documents
    for row, start, length in zip(documents.rows, documents.starts, documents.lengths, strict=True):
        piece = source.store.piece(int(row), int(start), int(length))
        labels = np.where(piece.weights > 0, piece.ids, IGNORE_INDEX)
        index = int(source.store.indices[row])
        yield {"source": name, "row": index, "input_ids": piece.ids.tolist(), "labels": labels.tolist()}
