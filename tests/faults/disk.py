"""Let every operation of a save fail in turn, and check what is left: the n-th one, for n = 1, 2, 3 … until it passes.

A small library (disk_faults.c), loaded before the C library, makes the n-th operation on files of one folder fail, for
Python and for the libraries in Rust and C++ alike. After each failure

- the error is one of this package, names the folder, and has exit code 4 if the disk is full;
- what is read back is the state before or the new one, whole;
- the same call without a fault then succeeds, and leaves no file that an undisturbed one does not leave.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from tests.faults import Figures

_SOURCE = Path(__file__).with_name("disk_faults.c")
_LIBRARY = "DISK_FAULTS_LIBRARY"
# Name -> errno of the operation (0: a write writes half), whether all later operations fail too.
FAULTS = {
    "full": (errno.ENOSPC, True),
    "full once": (errno.ENOSPC, False),
    "quota": (errno.EDQUOT, True),
    "I/O error": (errno.EIO, False),
    "read-only": (errno.EROFS, True),
    "path missing": (errno.ENOENT, False),
    "short write": (0, True),
}
_FULL = ("full", "full once", "quota")


@dataclass(frozen=True)
class Case:
    """Something that is saved.

    Attributes:
        folder: of everything that it writes.
        save: writes it.
        read: returns what a later command would read, None if there is nothing.
        most: how many operations are tried per fault, chosen by the seed; None for all.
        is_logged: a failure is a log line, and no error.
    """

    name: str
    folder: Path
    save: Callable[[], Any]
    read: Callable[[], Any]
    most: int | None = None
    is_logged: bool = False
    pristine: dict[str, bytes | None] = field(default_factory=dict)

    def remember(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pristine.update(self.content())

    def content(self) -> dict[str, bytes | None]:
        """Return the bytes of each file, and None for each folder."""
        paths = (path for path in sorted(self.folder.rglob("*")) if path.suffix != ".lock" and path.name != ".lock")
        return {str(path.relative_to(self.folder)): None if path.is_dir() else path.read_bytes() for path in paths}

    def restore(self) -> None:
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if str(path.relative_to(self.folder)) not in self.pristine:
                path.rmdir() if path.is_dir() else path.unlink()
        for name, content in self.pristine.items():
            path = self.folder / name
            if content is None:
                path.mkdir(exist_ok=True)
            elif not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)


class Disk:
    """The faults of the loaded library."""

    def __init__(self) -> None:
        library = ctypes.CDLL(os.environ[_LIBRARY])
        self._arm, self._count = library.disk_faults_arm, library.disk_faults_count
        self._arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
        self._count.restype = ctypes.c_long

    def attempt(self, case: Case, number: int = 0, fault: str = "full") -> tuple[int, BaseException | None, str]:
        """Save with a fault at an operation (0: none). Return how many operations there were, the error, the lines."""
        number_of_error, sticky = FAULTS[fault]
        error: BaseException | None = None
        with redirect_stderr(StringIO()) as lines, redirect_stdout(StringIO()):
            self._arm(os.fsencode(case.folder), number, number_of_error, sticky)
            try:
                case.save()
            except Exception as found:  # noqa: BLE001 - judged by the caller
                error = found
            finally:
                seen = self._count()
                self._arm(b"", 0, 0, 0)
        return seen, error, lines.getvalue()


def judge(case: Case, fault: str, error: BaseException | None, said: str, states: tuple[str, str]) -> str | None:
    """Return what is wrong after a failed save, or None. states: digests of what was read before, and after a save."""
    from finetune.system.errors import FinetuneError
    from tests.faults.damage import digest

    if error is not None and not isinstance(error, FinetuneError):
        return f"another error: {type(error).__name__}: {error}"
    if isinstance(error, FinetuneError):
        if str(case.folder) not in str(error):
            return f"the folder is not named: {error}"
        if (error.exit_code == 4) != (fault in _FULL):
            return f"exit code {error.exit_code}: {error}"
    try:
        found = digest(case.read())
    except Exception as unreadable:  # noqa: BLE001 - what is left must be readable
        return f"left something unreadable: {type(unreadable).__name__}: {unreadable}"
    if found not in states:
        return f"left neither the old nor the new state ({error or said})"
    # A lock file that is missing once counts as held by another process, which then writes the cache.
    is_known = case.is_logged and (str(case.folder) in said or fault == "path missing")
    if error is None and found != states[1] and not is_known:
        return f"failed without a word ({said})"
    return None


def run_case(case: Case, disk: Disk, seed: int, count: int, end: float | None) -> tuple[Counter[str], list[str]]:
    """Try the faults of a case; return counts and what went wrong. count: the last operation that is tried."""
    from tests.faults.damage import digest

    case.remember()
    before = digest(case.read())
    operations, error, _ = disk.attempt(case)
    assert error is None, f"{case.name}: {error}"
    after, files = digest(case.read()), case.content().keys()
    counts, wrong = Counter(operations=operations), []
    for fault in FAULTS:
        numbers = list(range(1, min(count, operations) + 1))
        if case.most is not None and len(numbers) > case.most:
            numbers = sorted(random.Random(f"{seed} {case.name} {fault}").sample(numbers, case.most))
        for number in numbers:
            if end is not None and time.monotonic() > end:
                return counts, wrong
            case.restore()
            _, error, said = disk.attempt(case, number, fault)
            counts["saves"] += 1
            counts["failed"] += error is not None
            problem = judge(case, fault, error, said, (before, after))
            _, again, _ = disk.attempt(case)
            if problem is None and again is not None:
                problem = f"the next save fails: {type(again).__name__}: {again}"
            if problem is None and (digest(case.read()) != after or case.content().keys() != files):
                left = sorted(case.content().keys() ^ files)
                problem = f"the next save leaves {', '.join(left) or 'another state'}"
            if problem is not None:
                wrong.append(f"{case.name}, {fault} at operation {number} of {operations}: {problem}")
    case.restore()
    return counts, wrong


def run(seed: int = 0, count: int = 200, minutes: float | None = None, names: tuple[str, ...] = ()) -> Figures:
    """Try every operation up to `count` of every save. minutes: stop early. names: of cases; default all."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "disk_faults.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, _SOURCE, "-ldl"], check=True)
        words = [str(seed), str(count), json.dumps(minutes), *names]
        environment = {**os.environ, "LD_PRELOAD": str(library), _LIBRARY: str(library)}
        command = [sys.executable, "-m", "tests.faults.disk", *words]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout.splitlines()[-1])


def _run_here(seed: int, count: int, minutes: float | None, names: list[str]) -> Figures:
    from tests.faults.disk_cases import build_cases

    end = None if minutes is None else time.monotonic() + 60 * minutes
    total: Counter[str] = Counter()
    cases: dict[str, Any] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        made: Iterator[Case] = build_cases(Path(folder), names)
        disk = Disk()
        for case in made:
            counts, found = run_case(case, disk, seed, count, end)
            total += counts
            cases[case.name] = dict(counts)
            wrong += found
    return {**total, "cases": cases, "lost": len(wrong), **({"examples": wrong[:20]} if wrong else {})}


if __name__ == "__main__":
    first, last, limit, *chosen = sys.argv[1:]
    print(json.dumps(_run_here(int(first), int(last), json.loads(limit), chosen)))
