"""Find the files of a source in the config, on disk or on the Hugging Face hub, and read their rows in order."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.sources.layouts import SPLITS
from finetune.data.sources.readers import RawBatch, kind_of, read_batches
from finetune.data.sources.text_files import COMPRESSIONS
from finetune.system.errors import DataError, os_errors_as

# A file of this name describes the other files of its folder, as for imagefolder and audiofolder of `datasets`.
METADATA = "metadata"
_MAGIC = re.compile(r"[*?[]")
_SHARD = re.compile(r"(?P<split>.+)-\d+-of-(?P<count>\d+)", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_SPLIT = re.compile(r"\w+(\.\w+)*")
# Part of an error of `datasets`, and what the user can do.
_HUB_ADVICE = {
    "Unknown split": "has no split {source.split!r}",
    "Config name is missing": "has several subsets; set subset",
    "BuilderConfig": "has no subset {source.subset!r}",
    "gated": "is gated; accept its terms on the hub and log in with hf auth login",
}


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The files of one source, in the order of their rows.

    path: as in the config.
    labels: the name of each file in locations.
    split: of one JSON file with a list of rows under each of several keys.
    """

    path: str
    name: str
    files: tuple[Path, ...]
    labels: tuple[str, ...]
    split: str | None = None

    @property
    def size_bytes(self) -> int:
        """Size on disk of all files."""
        return sum(file.stat().st_size for file in self.files)

    def digest(self) -> str:
        """Return the SHA-256 of the split and all names and contents, which decide the rows and their locations."""
        digest = hashlib.sha256(b"" if self.split is None else json.dumps({"split": self.split}).encode())
        for file, label in zip(self.files, self.labels, strict=True):
            with os_errors_as(DataError, f"{label} cannot be read"), file.open("rb") as content:
                inner = hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(json.dumps([label, inner]).encode())
        return digest.hexdigest()

    def batches(self, limit: int | None = None) -> Iterator[RawBatch]:
        """Read the first `limit` rows, bad ones included, or all rows. Memory: 2 MB, or the longest row.

        Raises: DataError if a file cannot be read, or there is no row.
        """
        rows, bytes_before = 0, 0
        for file, label in zip(self.files, self.labels, strict=True):
            for batch in read_batches(file, label, rows, bytes_before, self.split):
                if limit is not None and rows + len(batch.items) >= limit:
                    yield batch.split(limit - rows)[0]
                    return
                yield batch
                rows += len(batch.items)
            bytes_before += file.stat().st_size
        if rows == 0:
            raise DataError(f"{self.path} has no rows")


def resolve_source(source: SourceConfig) -> SourceFiles:
    """Find the files of a source; download a hub dataset that is not in the cache.

    Raises: DataError with what exists instead.
    """
    path = Path(os.path.expanduser(source.path))  # Path.expanduser raises where a user is unknown
    with os_errors_as(DataError, f"{source.path} cannot be read"):
        if path.is_dir():
            return _local(source, source.split or path.name, _folder_files(source, path))
        if path.exists():
            has_keys = kind_of(path)[0] == ".json"
            _refuse(source, "file", *(() if has_keys else ("split",)), "subset", "revision")
            return replace(_local(source, source.split or _stem(path), [path]), split=source.split)
        if _MAGIC.search(source.path):
            _refuse(source, "glob", "split", "subset", "revision")
            found = {Path(name) for name in glob.glob(str(path), recursive=True)}
            files = sorted(file for file in found if not file.is_dir())
            if not files:
                raise DataError(f"{path} matches no file{_near(path)}")
            fixed = [part for part in path.parts if not _MAGIC.search(part)]
            return _local(source, fixed[-1] if fixed else "rows", files)
        if is_on_hub(source):
            return _from_hub(source)
        raise DataError(f"{source.path} does not exist{_near(path)}")


def by_key(cfg: DataConfig) -> dict[str, list[SourceConfig]]:
    """Return the sources of a config, by their keys."""
    return {"data.train": cfg.train, "data.eval": cfg.eval}


def check_each(sources: Mapping[str, Sequence[SourceConfig]], check: Callable[[SourceConfig], object]) -> None:
    """Check every source. sources: by key. Raises: DataError listing the problem of each source."""
    problems = []
    for key, listed in sources.items():
        for i, source in enumerate(listed):
            try:
                check(source)
            except DataError as error:
                problems.append(f"{key}[{i}]: {error}")
    if problems:
        raise DataError("\n".join(problems))


def is_on_hub(source: SourceConfig) -> bool:
    """Return whether a source is a hub dataset: its path has the form of a hub id, and no such file exists."""
    path = Path(os.path.expanduser(source.path))
    return bool(_HUB_ID.fullmatch(source.path)) and not path.exists() and not _is_rows(path)


def _local(source: SourceConfig, name: str, files: list[Path]) -> SourceFiles:
    for file in files:
        if not stat.S_ISREG(file.stat().st_mode):
            raise DataError(f"{file} is not a regular file; save the rows to one, since they are read more than once")
        kind_of(file)
    return SourceFiles(source.path, source.name or name, tuple(files), tuple(str(file) for file in files))


def _from_hub(source: SourceConfig) -> SourceFiles:
    """Download a split into the hub's cache; its arrow files are in the order of its rows."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(source.path)
    if source.split is not None and not _HUB_SPLIT.fullmatch(source.split):
        raise DataError(f"{path}: split must be one name, found {source.split!r}; set limit to read fewer rows")
    try:
        loaded = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, keep_in_memory=False
        )
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        near = _near(path) if path.parent.is_dir() else ""
        raise DataError(f"{path}: {_hub_advice(source, error)}{near}") from error
    if isinstance(loaded, dict):
        splits = [*map(str, loaded)]
        raise DataError(f"{path}: set split to one of {', '.join(splits)}\nhelp: set split: {_first_split(splits)}")
    files = tuple(Path(file["filename"]) for file in loaded.cache_files)
    labels = tuple(f"{path}/{file.name}" for file in files)
    return SourceFiles(source.path, source.name or source.split or source.path, files, labels)


def _hub_advice(source: SourceConfig, error: Exception) -> str:
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    if isinstance(error, ConnectionError):
        return f"is not a file, and the hub cannot be reached; check the path or the network ({reason})"
    for mark, advice in _HUB_ADVICE.items():
        if mark in str(error):
            return f"{advice.format(source=source)} ({reason})"
    return f"is not a file, and the hub could not load it; check its name, subset and revision ({reason})"


def _refuse(source: SourceConfig, what: str, *settings: str) -> None:
    for setting in settings:
        if getattr(source, setting) is not None:
            raise DataError(f"{source.path} is a {what} and has no {setting} {getattr(source, setting)!r}; remove it")


def _is_rows(path: Path) -> bool:
    """Whether rows can be read from a file with this name."""
    try:
        kind_of(path)
    except DataError:
        return False
    return True


def _stem(path: Path) -> str:
    """The name without its suffixes: rows.jsonl.gz is rows."""
    path = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return path.stem


def _folder_files(source: SourceConfig, folder: Path) -> list[Path]:
    """The files of a split: written by `datasets.save_to_disk`, or named after the split."""
    _refuse(source, "folder", "revision")
    if source.subset is not None:
        folder = folder / source.subset
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder{_near(folder)}")
    if (folder / "dataset_dict.json").is_file():
        splits = _saved(folder / "dataset_dict.json", lambda saved: [str(name) for name in saved["splits"]])
        _choose(folder, source.split, splits)
        folder = folder / str(source.split)
    elif (folder / "state.json").is_file():
        _refuse(source, "saved dataset", "split")
    else:
        return _split_files(folder, source.split)
    # The shards of a saved dataset, in the order of its rows.
    shards = _saved(
        folder / "state.json", lambda state: [Path(entry["filename"]).name for entry in state["_data_files"]]
    )
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise DataError(f"{folder} lacks {missing[0]}, which its state.json names; save the dataset again")
    return [folder / name for name in shards]


def _saved(file: Path, names: Callable[[Any], list[str]]) -> list[str]:
    try:
        return names(json.loads(file.read_bytes()))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}: {error}); save the dataset again") from error


def _split_files(folder: Path, split: str | None) -> list[Path]:
    """For the split train: train.jsonl, or train-00000-of-00003.jsonl and the other shards."""
    found: dict[str, dict[tuple[str, ...], list[Path]]] = {}
    for file in sorted(folder.iterdir()):
        if _is_rows(file) and file.is_file():
            shard = _SHARD.fullmatch(_stem(file))
            name, count = (shard["split"], shard["count"]) if shard else (_stem(file), "1")
            found.setdefault(name, {}).setdefault((count, *kind_of(file)), []).append(file)
    if split is not None and split not in found and (folder / split).is_dir():  # as imagefolder has them
        return _split_files(folder / split, None)
    split = METADATA if split is None and list(found) == [METADATA] else split
    _choose(folder, split, list(found))
    (shards, *others) = found[str(split)].items()
    if others:
        names = ", ".join(files[0].name for files in found[str(split)].values())
        raise DataError(f"{folder} has {split} more than once ({names}); name one file, or a glob")
    (count, *_), files = shards
    if len(files) != int(count):
        raise DataError(f"{folder} has {len(files)} of {int(count)} files of {split}; add the others, or name a glob")
    return files


def _choose(folder: Path, split: str | None, splits: list[str]) -> None:
    if split is None and splits:
        one = f"set {{path: {folder}, split: {_first_split(splits)}}}"
        every = "" if {*SPLITS} & {*splits} else f"set {{path: {folder}/*.*}}, or for one of them "
        raise DataError(f"{folder} is a folder; set split (available: {', '.join(splits)})\nhelp: {every}{one}")
    if split not in splits:
        missing = "is a folder without rows" if split is None else f"has no split {split!r}"
        raise DataError(f"{folder} {missing} (available: {', '.join(splits) or _listing(folder)})")


def _first_split(splits: Sequence[str]) -> str:
    """Return the training split, or the first one if none has such a name."""
    return next((name for name in SPLITS if name in splits), splits[0])


def _near(path: Path) -> str:
    """Similar names in the deepest existing folder of a path, or its content."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    names = sorted(entry.name for entry in folder.iterdir())
    missing = path.relative_to(folder).parts[0]
    close = get_close_matches(missing, names, n=3)
    return f"; did you mean {folder / close[0]}?" if close else f"; {folder} holds {_listing(folder)}"


def _listing(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
