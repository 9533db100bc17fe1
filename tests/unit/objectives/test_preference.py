"""The losses against their formulas in float64; figures of a step; the reference cache."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from finetune.config.schema import PreferenceConfig
from finetune.data.batch import build_batch
from finetune.data.documents import Document
from finetune.losses.preference import PAIR_LOSSES, Answers, kto
from finetune.objectives.preference import FIGURES, SIDE_FIGURES, figures_of
from finetune.objectives.reference_cache import ReferenceCache
from finetune.system.errors import ConfigError, DataError, IntegrityError

CHOSEN = Answers(torch.tensor([-3.0, -40.0]), torch.tensor([-4.0, -35.0]), torch.tensor([2.0, 10.0]))
REJECTED = Answers(torch.tensor([-9.0, -0.01]), torch.tensor([-7.0, -0.5]), torch.tensor([3.0, 1.0]))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_formula(objective: str, cfg: PreferenceConfig, i: int) -> float:
    (cw, rw, nw), (cl, rl, nl) = (
        [float(x[i]) for x in (s.log_probs_A, s.reference_A, s.tokens_A)] for s in (CHOSEN, REJECTED)
    )
    beta = cfg.beta or 0.0
    if objective == "dpo":
        margin = beta * ((cw - rw) - (cl - rl))
        return -(1 - cfg.label_smoothing) * math.log(sigmoid(margin)) - cfg.label_smoothing * math.log(sigmoid(-margin))
    if objective == "ipo":
        return ((cw - rw) / nw - (cl - rl) / nl - 1 / (2 * beta)) ** 2
    if objective == "simpo":
        return -math.log(sigmoid(beta * (cw / nw - cl / nl) - cfg.gamma))
    odds = [p / (1 - p) for p in (math.exp(cw / nw), math.exp(cl / nl))]
    return -beta * math.log(sigmoid(math.log(odds[0] / odds[1])))


@pytest.mark.parametrize(
    ("objective", "settings"),
    [("dpo", {"label_smoothing": 0.2}), ("dpo", {}), ("ipo", {}), ("orpo", {}), ("simpo", {"gamma": 0.7})],
)
def test_a_loss_is_its_formula(objective, settings):
    cfg = PreferenceConfig(objective=objective, beta=0.4, **settings)
    found = PAIR_LOSSES[objective](CHOSEN, REJECTED, cfg)
    assert found.tolist() == pytest.approx([by_formula(objective, cfg, i) for i in range(2)], rel=1e-5)


def test_the_loss_of_verdicts_is_its_formula():
    cfg = PreferenceConfig(objective="kto", beta=0.4, desirable_weight=2.0, undesirable_weight=3.0)
    found = kto(CHOSEN, torch.tensor([True, False]), torch.tensor(0.5), cfg)
    good, bad = (2.0 * (1 - sigmoid(0.4 * (1.0 - 0.5))), 3.0 * (1 - sigmoid(0.4 * (0.5 + 5.0))))
    assert found.tolist() == pytest.approx([good, bad], rel=1e-5)


def test_figures_are_means_over_the_rows_that_have_them():
    sums = torch.tensor([2.0, 1.5, 4.0, 3.0, 6.0, -9.0, 30.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert len(sums) == len(FIGURES) + 2 * len(SIDE_FIGURES)
    assert figures_of(sums) == {
        "reward_accuracy": 0.75,
        "reward_margin": 2.0,
        "chosen_reward": 2.0,
        "chosen_log_prob": -3.0,
        "chosen_tokens": 10.0,
    }


def document(first: int) -> Document:
    return Document(np.array([first, 1, 2], np.int32), np.array([-100, 2, -100], np.int32), f"rows.jsonl:{first}")


def test_a_cache_gives_back_what_it_was_told_and_continues(tmp_path):
    documents = [document(i) for i in range(4)]
    scored: list[str] = []

    def score(some):
        for each in some:
            scored.append(each.location)
            yield -float(each.ids[0]) / 7

    cache = ReferenceCache(tmp_path, {"weights": "a"})
    assert cache.fill(documents[:2], score, lambda done, total: None) == 2
    again = ReferenceCache(tmp_path, {"weights": "a"})
    with pytest.raises(DataError, match=r"lacks 2 answers.*rows\.jsonl:2"):
        again.check_holds(documents)
    assert again.fill(documents, score, lambda done, total: None) == 2
    assert scored == [d.location for d in documents], "nothing is scored twice"
    found = ReferenceCache(tmp_path, {"weights": "a"}).log_probs(build_batch(documents[::-1]))
    assert found.tolist() == pytest.approx([-3 / 7, -2 / 7, -1 / 7, 0])
    with pytest.raises(ConfigError, match="another policy; different: weights"):
        ReferenceCache(tmp_path, {"weights": "b"})
    cache.file.write_bytes(cache.file.read_bytes()[:50])
    with pytest.raises(IntegrityError, match="finetune cache"):
        ReferenceCache(tmp_path, {"weights": "a"})
