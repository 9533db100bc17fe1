"""Suggestions are a function of the seed and the runs before, and lie in the space."""

from __future__ import annotations

import pytest

from finetune.sweep.record import Trial
from finetune.sweep.space import read_space
from finetune.sweep.suggest import suggest

pytest.importorskip("optuna")
WORDS = [
    "train.learning_rate=tag(log,interval(1e-4,1e-2))",
    "lora.rank=range(4,20,4)",
    "train.max_steps=interval(2,9)",
    "lora.target_modules=[q_proj,v_proj],all-linear",
]
SPACE = read_space(WORDS, "quickstart.yaml", True)


def loss_of(values: dict[str, str]) -> float:
    """Return a loss with its minimum at a rate of 1e-3 and a rank of 8."""
    return (float(values["train.learning_rate"]) * 1000 - 1) ** 2 + abs(int(values["lora.rank"]) - 8) / 10


def go_on(trials: list[Trial], count: int, seed: int = 0, minimize: bool = True) -> list[Trial]:
    trials = list(trials)
    while len(trials) < count:
        values = suggest(SPACE, trials, minimize, seed)
        metric = loss_of(values) if minimize else -loss_of(values)
        trials.append(Trial(len(trials) + 1, values, "finished", metric))
    return trials


def test_a_resumed_search_equals_an_uninterrupted_one():
    assert go_on(go_on([], 5), 14) == go_on([], 14)


def test_the_seed_decides():
    assert go_on([], 3, seed=1) == go_on([], 3, seed=1) != go_on([], 3, seed=2)


def test_neighboring_seeds_share_no_runs():
    firsts = {tuple(trial.values.items()) for seed in range(4) for trial in go_on([], 4, seed=seed)}
    assert len(firsts) == 16


def test_every_value_lies_in_its_space():
    for trial in go_on([], 25):
        rate = float(trial.values["train.learning_rate"])
        assert 1e-4 <= rate <= 1e-2 and rate == float(f"{rate:.4g}")
        assert trial.values["lora.rank"] in ("4", "8", "12", "16")
        assert int(trial.values["train.max_steps"]) in range(2, 10)
        assert trial.values["lora.target_modules"] in ("[q_proj,v_proj]", "all-linear")


@pytest.mark.parametrize("minimize", [True, False])
def test_later_runs_are_better_ones(minimize: bool):
    losses = [loss_of(trial.values) for trial in go_on([], 40, minimize=minimize)]
    assert sum(losses[30:]) < sum(losses[:10]) / 2


def test_runs_without_a_metric_are_ignored():
    past = go_on([], 4)
    failed = Trial(5, past[0].values, "failed")
    assert suggest(SPACE, [*past, failed], True, 0) == suggest(SPACE, [*past, Trial(5, past[1].values)], True, 0)
