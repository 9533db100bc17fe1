"""A few cases of every target in each run of the suite, shrunk by hypothesis, and what the campaign holds a case to."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from finetune.data.template import sandbox
from finetune.system.errors import FinetuneError
from tests.faults import __main__ as command
from tests.faults import fuzz

# Few: the campaign runs 20,000. Shrinking a case of a folder would take minutes.
_FEW = settings(
    max_examples=15,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sandbox, "_RENDER_SECONDS", sandbox._RENDER_SECONDS)  # restored: a target lowers it
    return tmp_path


@pytest.mark.parametrize("name", fuzz.targets())
def test_a_case_succeeds_or_is_an_error_of_this_package(name: str, in_folder: Path):
    case = fuzz.targets()[name](in_folder)

    @_FEW
    @given(rng=st.randoms(use_true_random=False))
    def run(rng: random.Random) -> None:
        try:
            case(rng)
        except FinetuneError as error:
            assert str(error).strip()

    run()


def _raises(rng: random.Random) -> None:
    raise KeyError("x")


def _hangs(rng: random.Random) -> None:
    while True:
        rng.random()


def _fills_memory(rng: random.Random) -> None:
    bytearray(fuzz.MEMORY_BYTES + (1 << 30))


def _swallows(rng: random.Random) -> None:
    with contextlib.suppress(Exception):  # as code that hides what it met
        os.system("true")  # noqa: S605


def _writes_outside(rng: random.Random) -> None:
    (Path("..") / "outside").write_text("x")


def _reads_outside(rng: random.Random) -> None:
    Path("/etc/hostname").read_bytes()


def _dies(rng: random.Random) -> None:
    os.abort()


def _is_refused(rng: random.Random) -> None:
    raise FinetuneError("wrong input")


BROKEN: dict[str, tuple[Callable[[random.Random], None], str]] = {
    "another exception": (_raises, "KeyError"),
    "no end": (_hangs, "needs"),
    "memory": (_fills_memory, "MemoryError"),
    "a program, and the error swallowed": (_swallows, "os.system"),
    "a file outside": (_writes_outside, "writes outside"),
    "a file read outside": (_reads_outside, "reads outside"),
    "the end of the process": (_dies, "SIGABRT"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_case_that_breaks_the_law_is_found(name: str, monkeypatch: pytest.MonkeyPatch, capfd):
    case, what = BROKEN[name]
    monkeypatch.setattr(fuzz, "_HANG_SECONDS", 0.3)
    monkeypatch.setattr(fuzz, "targets", lambda: {"broken": lambda folder: case})
    found = fuzz.run(0, 2, None)
    assert found["lost"] == 2 and found["targets"]["broken"]["findings"] == 1
    assert what in capfd.readouterr().err


def test_a_case_that_is_refused_keeps_the_law(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzz, "targets", lambda: {"refused": lambda folder: _is_refused})
    assert fuzz.run(0, 3, None)["targets"]["refused"] == {"cases": 3, "lost": 0, "findings": 0, "FinetuneError": 3}


def test_the_command_runs_one_target(capfd):
    assert command.main(["fuzz", "target=rows", "count=20", "seed=3"]) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["cases"] == 20 and figures["lost"] == 0 and list(figures["targets"]) == ["rows"]


def test_atheris_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "atheris", None)
    with pytest.raises(SystemExit, match="help: pip install atheris"):
        fuzz._atheris("rows", 1)
