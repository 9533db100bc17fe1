"""Rows in memory as a file, so that they take the same way as every dataset: checks, cache, loss mask, resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.system.atomic import write_bytes
from finetune.system.errors import DataError
from finetune.system.resources import cache_home


def write_rows(rows: Iterable[Mapping[str, Any]] | Any) -> Path:
    """Write rows as JSON lines into the cache, under a hash of their content.

    Args:
        rows: a list of mappings, a Dataset of the datasets library, or a DataFrame of pandas.

    Raises:
        DataError: a row is not a mapping of names to JSON values, or there is none.
    """
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        rows = rows.to_dict("records")
    lines = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"rows: row {number} is a {type(row).__name__}, expected a mapping such as {{prompt: …}}")
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise DataError(f"rows: row {number} holds a value that JSON lacks: {error}") from error
    if not lines:
        raise DataError("rows: there is no row")
    content = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    folder = cache_home("rows")
    file = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.jsonl"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(file, content, durable=True)
    return file
