"""A continuation repeats what the run chose by itself; what the user sets stays."""

from __future__ import annotations

import pytest
import torch

from finetune import train
from finetune.config.sections import TrainConfig
from finetune.training import choices
from finetune.training.checkpoint import read_state
from finetune.training.choices import repeat_choices
from tests.runs import differing, small_run

STORED = {"ranks": 1, "threads": 3, "micro_batch": 2, "gradient_checkpointing": 5, "compiled": True}


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(choices, "usable_cores", lambda: 4)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_automatic_settings_and_threads_are_repeated(four_cores, capsys):
    assert repeat_choices(TrainConfig(), STORED, 1, print) == {"micro_batch_size": 2, "gradient_checkpointing": 5}
    assert torch.get_num_threads() == 3
    assert "WARNING" not in capsys.readouterr().out


def test_what_the_user_sets_stays(four_cores):
    given = TrainConfig(micro_batch_size=1, gradient_checkpointing="all")
    assert repeat_choices(given, STORED, 1, print) == {}


def test_other_ranks_and_older_checkpoints_choose_anew(four_cores):
    assert repeat_choices(TrainConfig(), STORED, 2, print) == {}
    assert repeat_choices(TrainConfig(), {}, 1, print) == {}


@pytest.mark.parametrize("reason", ["few cores", "OMP_NUM_THREADS"])
def test_other_threads_are_reported(four_cores, monkeypatch, capsys, reason):
    if reason == "few cores":
        monkeypatch.setattr(choices, "usable_cores", lambda: 2)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    repeat_choices(TrainConfig(), STORED, 1, print)
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    assert "WARNING" in out and "threads: 3" in out


def test_a_continuation_with_more_memory_keeps_its_micro_batch(tmp_path):
    train(small_run(tmp_path / "unbroken", "train.micro_batch_size=1"))
    train(small_run(tmp_path / "resumed", "train.micro_batch_size=1", "train.max_steps=2", "train.save_every=2"))
    train(small_run(tmp_path / "resumed", "train.resume=auto", "train.save_every=2"))
    state = read_state(tmp_path / "resumed" / "checkpoint-4")
    assert (state.choices["micro_batch"], state.choices["compiled"]) == (1, False)
    assert differing(tmp_path / "unbroken", tmp_path / "resumed") == []
