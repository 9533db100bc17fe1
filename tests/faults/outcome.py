"""What a folder holds after a command, without measured times; how two such folders differ; locks that are held."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.system.locks import try_lock
from finetune.system.manifest import MANIFEST, read_manifest
from finetune.system.manifest import differences as damaged

# What a clock or the command line decides.
_TIMED = ("run.json", "state.json")  # files of runs and checkpoints, whose digests the manifest beside them holds
_MEASURED = {"seconds", "train_seconds", "duration_seconds", "tokens_per_second", "peak_bytes", "started", "command"}


def held_locks(folder: Path) -> list[str]:
    """Return the locks that a process still holds."""
    held = []
    for file in folder.rglob("*.lock"):
        if (lock := try_lock(file)) is None:
            held.append(f"{file.relative_to(folder)}: held")
        else:
            lock.release()
    return held


def content_of(folder: Path) -> dict[str, Any]:
    """Return what each file below a folder holds, by its path; folders too.

    Measured times are left out, and the page of a run, which forks do not draw.
    """
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.name != "report.html"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name] = "folder"
            continue
        data = path.read_bytes().replace(str(folder).encode(), b".")
        if path.name == MANIFEST and any((path.parent / timed).exists() for timed in _TIMED):
            found[name] = (set(read_manifest(path.parent)), damaged(path.parent))
        elif path.suffix == ".json":
            found[name] = _unmeasured(json.loads(data))
        elif path.suffix == ".jsonl":
            found[name] = [_unmeasured(json.loads(line)) for line in data.splitlines()]
        else:
            found[name] = data
    return found


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unmeasured(part) for key, part in value.items() if key not in _MEASURED}
    return [_unmeasured(part) for part in value] if isinstance(value, list) else value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the paths that are missing, left over or different."""
    reasons: dict[str, Callable[[str], bool]] = {
        "missing": lambda name: name not in found,
        "left over": lambda name: name not in expected,
        "different": lambda name: name in expected and name in found and expected[name] != found[name],
    }
    names = sorted(expected.keys() | found.keys())
    return [f"{name}: {reason}" for reason, is_so in reasons.items() for name in names if is_so(name)]
