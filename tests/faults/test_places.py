"""A run in an odd place with a wrong clock ends in the bits of any other run, and goes on in a copy of its folder."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from pathlib import Path

import pytest

from finetune import train
from finetune.models.adapters.folder import TENSOR_FILE
from finetune.system.manifest import differences
from tests.runs import adapter, reference_run, small_run

_YEARS = 10 * 365 * 24 * 3600


def test_clock_jumps_a_link_a_strange_name_and_a_copied_folder_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ("train.save_every=1", "train.max_steps=2", "train.keep_checkpoints=2")
    jumps = itertools.cycle((0, _YEARS, -_YEARS, 1))
    real, real_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + next(jumps) * 10**9)
    place = tmp_path / "Läufe mit Leerzeichen, 実行"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    train(small_run(tmp_path / "link" / "é run", *words))
    copy = Path(shutil.copytree(place / "é run", tmp_path / "copy"))
    shutil.rmtree(copy / "checkpoint-2")
    (copy / TENSOR_FILE).unlink()
    for file in copy.rglob("*"):
        os.utime(file, (real() + _YEARS, real() + _YEARS))
    train(small_run(copy, *words, "train.resume=auto"))
    expected = adapter(reference_run(*words))
    for folder in (place / "é run", copy):
        found = adapter(folder)
        assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert differences(copy) == []
