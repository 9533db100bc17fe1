"""Data sets of the hub: downloaded into the hub's cache, then read like any other arrow files."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.config.schema import SourceConfig
from finetune.errors import DataError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLIT = re.compile(r"\w+(\.\w+)*")


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
        raise DataError(f"{source.path}: {_advice(source, error)} ({_first_line(error)})") from error
    if isinstance(loaded, dict):
        raise DataError(f"{source.path}: set split to one of {', '.join(map(str, loaded))}")
    return [Path(file["filename"]) for file in loaded.cache_files]


def _advice(source: SourceConfig, error: Exception) -> str:
    text = str(error).lower()
    if "gated" in text or "401" in text or "403" in text:
        return "access is restricted; accept its terms on the hub, then log in with `hf auth login`"
    if "split" in text:
        return f"has no split {source.split!r}"
    if "config" in text:
        return f"has no subset {source.subset!r}" if source.subset else "has several subsets; set subset"
    if isinstance(error, ConnectionError) or "offline" in text or "connect" in text:
        return "no file of that name here, and the hub is out of reach; check the path or the network"
    return "no file of that name here, and the hub could not give it; check the path, subset and revision"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
