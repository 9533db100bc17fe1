"""The process of a run: exit code, output, signals, and its end when the sweep is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from finetune.sweep.process import Stop, run_process, wait_until_free
from finetune.system.locks import try_lock


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("print('hello')", (0, "hello")),
        ("import sys; print('error: a\\n  b', file=sys.stderr); sys.exit(3)", (3, "a\n  b")),
        ("print('error: old'); print('fine'); print('error: new')", (0, "new")),
        ("import os; os.kill(os.getpid(), 9)", (137, "")),
        ("import sys; sys.stdout.buffer.write('é'.encode()[:1] + b'|')", (0, "\ufffd|")),
    ],
)
def test_exit_code_and_last_error_are_returned(tmp_path: Path, code: str, ended: tuple[int, str]):
    assert run_process(python(code), tmp_path / "log", Stop()) == ended


def test_the_output_is_copied_and_appended_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "log").write_text("before\n")
    run_process(python("print('now é')"), tmp_path / "log", Stop())
    assert capfd.readouterr().err == "now é\n"
    assert (tmp_path / "log").read_text() == "before\nnow é\n"


def test_a_command_that_cannot_start_raises(tmp_path: Path):
    with pytest.raises(OSError):
        run_process([str(tmp_path / "nothing")], tmp_path / "log", Stop())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_run_once_and_not_the_sweep(tmp_path: Path, number: int):
    code = (
        "import signal, time\n"
        f"signal.signal({int(number)}, lambda *_: print('caught', flush=True))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    log = tmp_path / "log"

    def send() -> None:
        while "ready" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.02)
        os.kill(os.getpid(), number)
        while "caught" not in log.read_text():
            time.sleep(0.02)
        stop._send(signal.SIGKILL)

    before = signal.getsignal(number)
    with Stop() as stop:
        threading.Thread(target=send, daemon=True).start()
        assert run_process(python(code), log, stop) == (137, "caught")
    assert stop.received == number and log.read_text().count("caught") == 1
    assert signal.getsignal(number) == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not end a run with its parent")
def test_a_run_gets_sigterm_and_can_still_write_when_its_sweep_is_killed(tmp_path: Path):
    log = tmp_path / "log"
    run = (
        "import signal, sys, time\n"
        "def end(*_): print('saving', flush=True); print('saved', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end); print('ready', flush=True); time.sleep(60)"
    )
    sweep = (
        "import sys; from pathlib import Path; from finetune.sweep.process import Stop, run_process\n"
        f"run_process([sys.executable, '-c', {run!r}], Path({str(log)!r}), Stop())"
    )
    process = subprocess.Popen([sys.executable, "-c", sweep], stderr=subprocess.DEVNULL)
    _wait_for("ready", log)
    process.kill()
    process.wait()
    _wait_for("saved", log)
    assert log.read_text().split() == ["ready", "saving", "saved"]


def _wait_for(word: str, log: Path) -> None:
    end = time.monotonic() + 60
    while word not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < end, f"no {word}"
        time.sleep(0.02)


def test_a_locked_folder_is_waited_for(tmp_path: Path):
    wait_until_free(tmp_path, Stop())
    lock = try_lock(tmp_path / ".lock")
    assert lock is not None
    waiting = threading.Thread(target=wait_until_free, args=(tmp_path, Stop()), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    lock.release()
    waiting.join(30)
    assert not waiting.is_alive()
