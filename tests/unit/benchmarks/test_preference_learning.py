"""The summary of what each preference objective learns."""

from __future__ import annotations

import pytest
import torch

from benchmarks.preference_learning import Measured, summarize
from finetune.losses.preference import Answers


def side(*log_probs: float) -> Answers:
    sums = torch.tensor(log_probs)
    return Answers(sums, torch.zeros_like(sums), torch.full_like(sums, 10.0))


BASE = Measured(side(-1.0, -9.0), side(-2.0, -3.0), tokens=10.0, exact=0.5)
RUNS = {
    "dpo": [{"seed": 0, "reward": 0.99}, {"seed": 1, "reward": 0.94}],
    "orpo": [{"seed": 0, "reward": 0.95, "exact": 0.8}, {"seed": 1, "reward": 0.95, "exact": 0.9}],
    "sft": [{"seed": 0, "exact": 0.9}, {"seed": 1, "exact": 0.9}],
}


def test_the_worst_seed_decides_a_bar() -> None:
    bars = {(bar["variant"], bar["figure"]): bar for bar in summarize(BASE, RUNS, complete=True)["bars"]}
    assert bars["base", "ranked"]["found"] == 0.5 and bars["base", "ranked"]["met"]
    assert bars["dpo", "reward"]["found"] == 0.94 and not bars["dpo", "reward"]["met"]
    assert bars["orpo", "exact_over_sft"]["found"] == pytest.approx(-0.05)


def test_no_bar_is_judged_before_all_runs_are_done() -> None:
    assert summarize(BASE, RUNS, complete=False)["bars"] == []
