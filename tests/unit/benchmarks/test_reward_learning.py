"""The bars of learning from rewards are on the worst seed."""

from __future__ import annotations

from benchmarks.reward_learning import COLUMNS, summarize


def test_one_weak_seed_misses_the_bar():
    figures = dict.fromkeys((key for _, key, _, _ in COLUMNS), 0.0) | {"reward_before": 0.36}
    good, weak = ({**figures, "reward": reward} for reward in (0.97, 0.84))
    verdicts = {
        name: [bar["met"] for bar in summarize(runs)["bars"]]
        for name, runs in {
            "all good": {"seed 0": good, "seed 1": good},
            "one weak": {"seed 0": good, "seed 1": weak},
        }.items()
    }
    assert verdicts == {"all good": [True, True, True], "one weak": [True, True, False]}
