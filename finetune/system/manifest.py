"""The manifest of a folder: size and SHA-256 of its files, by which damage is found before a file is used.

A checkpoint has one for all its files. A run folder has one for those that are read back. A file that a manifest does
not list, as in an adapter of another program, is read without this check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetune.system.atomic import write_text
from finetune.system.errors import IntegrityError
from finetune.system.sealed import seal, unseal

MANIFEST = "manifest.json"


class Entry(NamedTuple):
    """What a manifest says of a file."""

    size_bytes: int
    sha256: str


def sha256_of(file: Path) -> str:
    """Return the hex SHA-256 of a file's content, read in blocks."""
    with file.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def record_files(folder: Path, names: Iterable[str], forget: Iterable[str] = ()) -> None:
    """Enter files of a folder into its manifest, in place of older entries.

    Args:
        names: of files; those that are missing lose their entry.
        forget: of files that will be written later, which lose their entry until then.
    """
    names = list(names)
    entries = {name: entry for name, entry in read_manifest(folder).items() if name not in {*names, *forget}}
    files = [folder / name for name in names]
    entries |= {file.name: Entry(file.stat().st_size, sha256_of(file)) for file in files if file.is_file()}
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(entries.items())}
    write_text(folder / MANIFEST, json.dumps(seal(listed), indent=2))


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Return the entries of a folder's manifest by name; none without one. Raises: IntegrityError if it is corrupt."""
    file = folder / MANIFEST
    try:
        content: dict[str, Any] = unseal(json.loads(file.read_text(encoding="utf-8")))
        return {name: Entry(int(entry["bytes"]), str(entry["sha256"])) for name, entry in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise IntegrityError(
            f"{folder}: {MANIFEST} is corrupt ({error})\nhelp: copy it again, or remove it to read the files unchecked"
        ) from error


def differences(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Return how files differ from the manifest, one line for each; of these names, or of all that it lists.

    Raises: IntegrityError if the manifest is corrupt.
    """
    entries = read_manifest(folder)
    problems = []
    for name in entries if names is None else [name for name in names if name in entries]:
        file, (size, digest) = folder / name, entries[name]
        if Path(name).name != name or not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes, not {size}")
        elif sha256_of(file) != digest:
            problems.append(f"{name} was altered")
    return problems


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Raise IntegrityError naming the files that exist and differ from what the manifest lists."""
    there = [name for name in names if (folder / name).is_file()]
    if problems := differences(folder, there):
        raise IntegrityError(
            f"{folder}: {'; '.join(problems)} since {MANIFEST} was written\n"
            f"help: copy the folder again; if you edited the file, remove {MANIFEST}"
        )
