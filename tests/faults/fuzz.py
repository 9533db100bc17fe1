"""Feed wrong input to everything that reads what others wrote.

python -m tests.faults fuzz [target=NAME] [seed=0] [count=20000] [minutes=M]     count: cases of each target
python -m tests.faults.fuzz atheris TARGET [SECONDS]                             guided by coverage, where atheris is

The law of a case: it succeeds, or ends with an error of this package. No other exception, at most CASE_SECONDS of the
processor, at most MEMORY_BYTES more memory, no code or program started, no connection, no file outside its folder.
Each target runs in a child process, which enforces this. A case is a function of (target, seed, number).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from finetune.system.errors import FinetuneError
from tests.faults import Figures

CASE_SECONDS = 1.0
MEMORY_BYTES = 2 << 30
# A case that needs this much of the processor is ended.
_HANG_SECONDS = 20.0
_CHECKOUT = Path(__file__).resolve().parents[2]
_READABLE = (str(_CHECKOUT), sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/usr", "/etc/ld", "/lib")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "socket.connect")

# Builds what a target needs in a folder, and returns the function that runs one case.
Case = Callable[[random.Random], None]
Target = Callable[[Path], Case]


def targets() -> dict[str, Target]:
    """Return every target by its name."""
    from tests.faults import fuzz_folders, fuzz_texts

    return fuzz_texts.TARGETS | fuzz_folders.TARGETS


class Broken(BaseException):
    """The law of a case was broken, in a way that no code may catch."""


def run(seed: int, count: int, minutes: float | None, target: str = "") -> Figures:
    """Run `count` cases of each target, or of one; stop after `minutes`, divided among them."""
    names = [target] if target else list(targets())
    figures: Figures = {"lost": 0, "cases": 0, "targets": {}}
    for i, name in enumerate(names):
        left = None if minutes is None else (minutes * 60 - figures.get("_spent", 0.0)) / (len(names) - i)
        began = time.monotonic()
        found = _campaign(name, seed, count, left)
        figures["_spent"] = figures.get("_spent", 0.0) + time.monotonic() - began
        figures["targets"][name] = found
        figures["lost"] += found["lost"]
        figures["cases"] += found["cases"]
    figures.pop("_spent")
    return figures


def _campaign(name: str, seed: int, count: int, seconds: float | None) -> Figures:
    """Run the cases of one target in children: a child that dies is replaced by one that goes on after its case."""
    build = targets()[name]
    kinds: Counter[str] = Counter()
    findings: dict[str, dict[str, Any]] = {}
    began, number = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = mmap.mmap(-1, 16)  # shared with the children: the case that runs, and the processor time at its start
        results = Path(folder) / "results.jsonl"
        while number < count and (seconds is None or time.monotonic() - began < seconds):
            results.write_text("")
            place[:16] = number.to_bytes(8, "little") + bytes(8)
            rest = None if seconds is None else seconds - (time.monotonic() - began)
            child = os.fork()
            if child == 0:
                _child(build, Path(folder) / "work", place, results, (name, seed, number, count, rest))
            ended = _wait(child, place)
            lines = [json.loads(line) for line in results.read_text().splitlines()]
            kinds.update(lines[-1]["kinds"] if lines and "kinds" in lines[-1] else {})
            for line in lines:
                if "finding" in line:
                    findings.setdefault(line["finding"], {"case": line["case"], "times": 0, **line})["times"] += 1
            number = int.from_bytes(place[:8], "little")
            if ended:
                findings.setdefault(f"the process ended: {ended}", {"case": number, "times": 0})["times"] += 1
                number += 1
    for what, found in findings.items():
        print(f"{name} case={found['case']} times={found['times']}: {what}\n{found.get('trace', '')}", file=sys.stderr)
    lost = sum(found["times"] for found in findings.values())
    return {"cases": number, "lost": lost, "findings": len(findings), **kinds}


def _wait(child: int, place: mmap.mmap) -> str:
    """Wait for a child; return why it ended early, or nothing."""
    process = psutil.Process(child)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return "" if code == 0 else signal.Signals(-code).name if code < 0 else f"exit code {code}"
        time.sleep(0.2)
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            if times.user + times.system - int.from_bytes(place[8:], "little") / 1e9 > 2 * _HANG_SECONDS:
                process.kill()


def _child(build: Target, folder: Path, place: mmap.mmap, results: Path, cases: tuple) -> None:
    """Run cases until the last one, write what broke the law, and end the process."""
    name, seed, first, count, seconds = cases
    code = 70
    try:
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        os.environ["FINETUNE_CACHE"] = str(folder / "cache")
        with results.open("a") as stream, open(os.devnull, "w") as nothing:
            sys.stdout = sys.stderr = nothing
            case = build(folder)
            watch = Watch(folder)
            kinds: Counter[str] = Counter()
            end = None if seconds is None else time.monotonic() + seconds
            number = first
            while number < count and (end is None or time.monotonic() < end):
                place[:16] = number.to_bytes(8, "little") + time.process_time_ns().to_bytes(8, "little")
                kind, finding, trace = watch.check(case, f"{name}:{seed}:{number}")
                kinds[kind] += 1
                if finding:
                    stream.write(json.dumps({"finding": finding, "case": number, "trace": trace}) + "\n")
                    stream.flush()
                number += 1
            place[:8] = number.to_bytes(8, "little")
            stream.write(json.dumps({"kinds": kinds}) + "\n")
        code = 0
    except BaseException:  # noqa: BLE001 - the last frame of the process: its parent reads the exit code
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


class Watch:
    """Holds a process to the law while it runs cases. It can't be undone, so it belongs into a child."""

    def __init__(self, folder: Path):
        self.folder, self.breach, self.running = str(folder), "", False
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        limit = psutil.Process().memory_info().vms + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGPROF, self._hangs)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.addaudithook(self._audit)

    def check(self, case: Case, seed: str) -> tuple[str, str, str]:
        """Run a case; return how it ended, and if it broke the law, how and where."""
        kind, finding, trace, spent = self._once(case, seed)
        if not finding and spent > CASE_SECONDS:
            # The first case of its kind pays for imports.
            *_, spent = self._once(case, seed)
            if spent > CASE_SECONDS:
                return kind, f"needs {spent:.0f} s or more", ""
        return kind, finding, trace

    def _once(self, case: Case, seed: str) -> tuple[str, str, str, float]:
        began = time.process_time()
        self.breach, self.running = "", True
        signal.setitimer(signal.ITIMER_PROF, _HANG_SECONDS)
        kind, finding, trace = "accepted", "", ""
        try:
            case(random.Random(seed))
        except FinetuneError as error:
            kind = type(error).__name__
            if not str(error).strip():
                finding = f"an empty {kind}"
        except BaseException as error:  # noqa: BLE001 - what else may come out is what a campaign looks for
            trace = "".join(traceback.format_exception(error)[-6:])
            # The hook itself needs a frame: a case that comes so close to the limit is not counted.
            last = traceback.extract_tb(error.__traceback__)[-1]
            in_hook = isinstance(error, RecursionError) and last.name == "_audit"
            kind = "not counted" if in_hook else "broken"
            finding = "" if in_hook else f"{type(error).__name__} at {_place(error)}"
        finally:
            self.running = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        if self.breach:
            kind, finding = "broken", self.breach
        return kind, finding, trace, time.process_time() - began

    def _hangs(self, *_: Any) -> None:
        raise Broken(f"needs more than {_HANG_SECONDS:g} s")

    def _audit(self, event: str, arguments: tuple) -> None:
        with contextlib.suppress(RecursionError):  # close to the limit, which is a matter of the case
            self._look(event, arguments)

    def _look(self, event: str, arguments: tuple) -> None:
        if not self.running or self.breach:
            return
        if event in _STARTS or event == "pickle.find_class":
            self.breach = f"{event} {str(arguments)[:80]}"
        elif event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if isinstance(path, str | bytes) and not self._allowed(path, bool(writes)):
                self.breach = f"{'writes' if writes else 'reads'} outside its folder at {_here()}"
        elif event in _CHANGES:
            for path in arguments:
                if isinstance(path, str | bytes) and not self._allowed(path, True):
                    self.breach = f"{event} outside its folder at {_here()}"

    def _allowed(self, path: str | bytes, writes: bool) -> bool:
        try:
            real = os.path.realpath(os.fsdecode(path))
        except ValueError:
            return True  # open refuses it, too
        return f"{real}/".startswith((f"{self.folder}/", "/dev/null")) or (not writes and real.startswith(_READABLE))


def _place(error: BaseException) -> str:
    """Return the last frame of this package in a traceback, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/finetune/" in frame.filename and "site-packages" not in frame.filename]
    return " in ".join(dict.fromkeys(_frame(frame) for frame in (frames[-1], *own[-1:])))


def _here() -> str:
    return _frame(next((f for f in reversed(traceback.extract_stack()) if "/finetune/" in f.filename), None))


def _frame(frame: traceback.FrameSummary | None) -> str:
    return "another program" if frame is None else f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"


def _atheris(name: str, seconds: int) -> None:
    """Let atheris choose the bytes that a case draws its choices from, guided by the lines that they reach."""
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed\nhelp: pip install atheris")
    with atheris.instrument_imports(include=["finetune"]):
        build = targets()[name]
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        os.environ["FINETUNE_CACHE"] = str(folder / "cache")
        os.chdir(folder)
        case = build(folder)

    def once(raw: bytes) -> None:
        with contextlib.suppress(FinetuneError):
            case(Drawn(raw))

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", "-len_control=0", "-timeout=20"], once)
    atheris.Fuzz()


class Drawn(random.Random):
    """Random numbers read from given bytes; after their end, zeros."""

    def __init__(self, raw: bytes):
        super().__init__(0)
        self._bits = _bytes_of(raw)

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        return int.from_bytes(bytes(next(self._bits) for _ in range(size)), "little") >> (8 * size - k)

    def random(self) -> float:
        return self.getrandbits(53) / 2**53


def _bytes_of(raw: bytes) -> Iterator[int]:
    yield from raw
    while True:
        yield 0


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "atheris":
        sys.exit(__doc__)
    _atheris(sys.argv[2], int((sys.argv[3:] or ["600"])[0]))
