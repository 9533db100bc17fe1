"""A lock is held by one process and ends with it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.system.locks import locked, try_lock
from finetune.system.resources import cache_home


def test_a_held_lock_is_refused_and_a_released_one_is_given(tmp_path: Path):
    file = tmp_path / "a.lock"
    with locked(file) as mine:
        assert mine and try_lock(file) is None
        with locked(file, 0) as again:
            assert not again
    lock = try_lock(file)
    assert lock is not None
    lock.release()


def test_a_lock_ends_with_a_killed_process(tmp_path: Path):
    file = tmp_path / "a.lock"
    code = (
        "import sys, time; from finetune.system.locks import try_lock\n"
        "lock = try_lock(sys.argv[1]); print(lock is not None, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        assert try_lock(file) is None
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    lock = try_lock(file)
    assert lock is not None
    lock.release()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        try_lock(tmp_path / "file" / "a.lock")


@pytest.mark.parametrize(
    ("environment", "home"),
    [
        ({"FINETUNE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/tokens"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/finetune/tokens"),
        ({"HOME": "/c"}, "/c/.cache/finetune/tokens"),
    ],
)
def test_every_kind_of_cache_has_a_folder_in_one_home(monkeypatch, environment: dict[str, str], home: str):
    for name in ("FINETUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_home("tokens") == Path(home)
