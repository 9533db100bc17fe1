"""Datasets of the Hugging Face hub: downloaded into its cache, then read like other arrow files."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.config.schema import SourceConfig
from finetune.system.errors import DataError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLIT = re.compile(r"\w+(\.\w+)*")

# Part of an error of `datasets`, and what the user can do.
_ADVICE = {
    "Unknown split": "has no split {source.split!r}",
    "Config name is missing": "has several subsets; set subset",
    "BuilderConfig": "has no subset {source.subset!r}",
    "gated": "is gated; accept its terms on the hub and log in with hf auth login",
}


def hub_files(source: SourceConfig) -> list[Path]:
    """Download a split, and return its arrow files in the order of its rows.

    Raises: DataError with advice if the hub, the dataset, its subset or its split cannot be reached.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    if source.split is not None and not _SPLIT.fullmatch(source.split):
        raise DataError(f"{source.path}: split must be one name, found {source.split!r}; set limit to read fewer rows")
    try:
        loaded = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, keep_in_memory=False
        )
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{source.path}: {_advice(source, error)}") from error
    if isinstance(loaded, dict):
        raise DataError(f"{source.path}: set split to one of {', '.join(map(str, loaded))}")
    return [Path(file["filename"]) for file in loaded.cache_files]


def _advice(source: SourceConfig, error: Exception) -> str:
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split())[:300]
    if isinstance(error, ConnectionError):
        return f"is not a file, and the hub cannot be reached; check the path or the network ({reason})"
    for mark, advice in _ADVICE.items():
        if mark in str(error):
            return f"{advice.format(source=source)} ({reason})"
    return f"is not a file, and the hub could not load it; check its name, subset and revision ({reason})"
