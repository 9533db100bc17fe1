"""The learning rate is a pure function of the step; the update is AdamW over the trained parameters alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.config.schema import TrainConfig
from finetune.training.optim import build_optimizer, learning_rate_at, warmup_steps


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.0}, {"warmup_ratio": 0.1}, {"warmup_steps": 5}])
@pytest.mark.parametrize("total", [1, 2, 50])
def test_rates_rise_to_the_peak_then_never_rise_again_and_stay_positive(schedule, warmup, total):
    cfg = TrainConfig(schedule=schedule, **warmup, learning_rate=1e-3)
    rates = [learning_rate_at(cfg, step, total) for step in range(1, total + 1)]
    peak = max(1, warmup_steps(cfg, total))
    assert rates[peak - 1] == max(rates) == 1e-3
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak - 1 :] == sorted(rates[peak - 1 :], reverse=True)
    assert min(rates) > 0


def test_cosine_is_half_way_down_at_half_the_steps_and_near_zero_at_the_last():
    cfg = TrainConfig(schedule="cosine", warmup_ratio=0.0, learning_rate=1.0)
    assert learning_rate_at(cfg, 51, 100) == pytest.approx(0.5)
    assert learning_rate_at(cfg, 100, 100) < 0.001


def test_warmup_is_a_share_of_the_steps_or_a_number_of_them():
    assert warmup_steps(TrainConfig(warmup_ratio=0.1), 200) == 20
    assert warmup_steps(TrainConfig(warmup_steps=10), 200) == 10
    assert warmup_steps(TrainConfig(warmup_steps=300), 200) == 200


def test_only_trained_parameters_are_optimized_and_every_setting_arrives():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    cfg = TrainConfig(learning_rate=0.1, beta1=0.5, beta2=0.6, eps=1e-3, weight_decay=0.2)
    optimizer = build_optimizer(cfg, model.named_parameters())
    [group] = optimizer.param_groups
    assert group["param_names"] == ["1.weight", "1.bias"]
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.5, 0.6), 1e-3, 0.2, 0.1)
    # One step by hand, Loshchilov & Hutter 2019, algorithm 2: the first step's corrected moments are g and g^2.
    before, gradient = model[1].bias.detach().clone(), torch.tensor([1.0, -2.0, 0.5])
    model[1].bias.grad, model[1].weight.grad = gradient, torch.zeros(3, 3)
    optimizer.step()
    expected = before * (1 - 0.1 * 0.2) - 0.1 * gradient / (gradient.abs() + 1e-3)
    torch.testing.assert_close(model[1].bias.detach(), expected)
