"""Data sets of the hub: downloaded into the hub's cache, then read like any other arrow files."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.config.schema import SourceConfig
from finetune.system.errors import DataError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLIT = re.compile(r"\w+(\.\w+)*")

# What the library says about what the user can mend.
_ADVICE = {
    "Unknown split": "has no split {source.split!r}",
    "Config name is missing": "has several subsets; set subset",
    "BuilderConfig": "has no subset {source.subset!r}",
    "gated": "is gated; accept its terms on the hub and log in with hf auth login",
}


def hub_files(source: SourceConfig) -> list[Path]:
    """The arrow files of a split, in the order of its rows.

    Raises: DataError saying what to do if the hub, the data set, its subset or its split is out of reach.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    if source.split is not None and not _SPLIT.fullmatch(source.split):
        raise DataError(f"{source.path}: split must be one name, got {source.split!r}; take fewer rows with limit")
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
    said = " ".join(str(cause).split())[:300]
    if isinstance(error, ConnectionError):
        return f"is no file here, and the hub is out of reach; check the path or the network ({said})"
    for mark, advice in _ADVICE.items():
        if mark in str(error):
            return f"{advice.format(source=source)} ({said})"
    return f"is no file here, and the hub could not give it; check its name, subset and revision ({said})"
