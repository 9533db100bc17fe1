"""Optimizers and learning rates: those of the papers and of transformers, with a state that restores exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import get_inverse_sqrt_schedule, get_wsd_schedule

from finetune.config.schema import TrainConfig
from finetune.models.safetensors_index import save_tensors
from finetune.planning.static_memory import _MOMENTS
from finetune.system.errors import IntegrityError
from finetune.training.checkpoint import TRAINING, load_training, training_tensors
from finetune.training.optimizer import build_optimizer, learning_rate_at, warmup_steps

KINDS = ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt", "wsd"])
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


def rates_of(schedule: torch.optim.lr_scheduler.LambdaLR, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return rates


def test_after_the_warmup_the_rates_are_those_of_transformers():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = rates_of(get_inverse_sqrt_schedule(optimizer, num_warmup_steps=10), 60)
    cfg = TrainConfig(schedule="inverse_sqrt", warmup_steps=10, learning_rate=1.0)
    assert [learning_rate_at(cfg, step, 60) for step in range(11, 61)] == pytest.approx(theirs[10:])

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    wsd = get_wsd_schedule(optimizer, num_warmup_steps=10, num_decay_steps=20, num_training_steps=60, min_lr_ratio=0.1)
    theirs = rates_of(wsd, 60)
    cfg = TrainConfig(schedule="wsd", warmup_steps=10, learning_rate=1.0, decay_ratio=20 / 60, min_lr_ratio=0.1)
    assert [learning_rate_at(cfg, step, 60) for step in range(11, 61)] == pytest.approx(theirs[10:])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_rate_falls_to_the_smallest_share_and_no_further(schedule):
    cfg = TrainConfig(schedule=schedule, warmup_ratio=0.0, learning_rate=1.0, min_lr_ratio=0.25)
    rates = [learning_rate_at(cfg, step, 1000) for step in range(1, 1001)]
    assert 0.25 < rates[-1] < 0.26 and rates[0] == 1.0


class Net(nn.Module):
    """Two matrices with the names of LoRA's; one is large enough for 8-bit moments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(512, 16, bias=False)})})
        self.q["lora_B"] = nn.ModuleDict({"default": nn.Linear(16, 8, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q["lora_B"]["default"](self.q["lora_A"]["default"](x))


def run(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(32, 512, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - x[:, :8]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", [*KINDS, "lion", "lion_8bit"])
def test_a_restored_state_continues_to_the_same_bits(kind, tmp_path: Path):
    cfg = TrainConfig(optimizer=kind, learning_rate=1e-2, weight_decay=0.01)
    unbroken = Net()
    optimizer = build_optimizer(cfg, unbroken.named_parameters())
    run(unbroken, optimizer, range(5))
    save_tensors(training_tensors(optimizer), tmp_path / TRAINING)
    run(unbroken, optimizer, range(5, 10))

    resumed = Net()
    optimizer = build_optimizer(cfg, resumed.named_parameters())
    load_training(tmp_path, optimizer)
    run(resumed, optimizer, range(5, 10))
    for ours, theirs in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("saved", "loaded"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw"), ("lion", "adamw"), ("lion", "adamw_8bit")]
)
def test_the_state_of_another_optimizer_is_refused(saved, loaded, tmp_path: Path):
    net = Net()
    optimizer = build_optimizer(TrainConfig(optimizer=saved), net.named_parameters())
    run(net, optimizer, range(1))
    save_tensors(training_tensors(optimizer), tmp_path / TRAINING)
    with pytest.raises(IntegrityError, match="lora_A"):
        load_training(tmp_path, build_optimizer(TrainConfig(optimizer=loaded), net.named_parameters()))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_smaller_state_follows_the_loss_of_adamw(kind):
    """Paged moments are the same 32 bits; 8-bit ones are within 2 % of the loss at every one of 100 steps."""
    losses = {}
    for name in ("adamw", kind):
        net = Net()
        optimizer = build_optimizer(TrainConfig(optimizer=name, learning_rate=3e-3), net.named_parameters())
        losses[name] = run(net, optimizer, range(100))
    assert losses["adamw"][-1] < 0.5 * losses["adamw"][0]
    assert losses[kind] == pytest.approx(losses["adamw"], rel=0.02 if "8bit" in kind else 1e-5)


def test_lion_moves_every_value_by_the_rate():
    """The first step by hand, Chen et al. 2023, algorithm 2: the sign of the gradient, and decoupled weight decay."""
    net = nn.Linear(3, 1, bias=False)
    cfg = TrainConfig(optimizer="lion", learning_rate=0.1, weight_decay=0.2)
    optimizer = build_optimizer(cfg, net.named_parameters())
    before = net.weight.detach().clone()
    net.weight.grad = torch.tensor([[1.0, -2.0, 0.5]])
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), before * (1 - 0.1 * 0.2) - 0.1 * torch.tensor([[1.0, -1.0, 1.0]]))
    assert _MOMENTS["lion"] == optimizer.state[net.weight]["state1"].itemsize


def test_lora_plus_raises_the_rate_of_the_b_matrices_alone():
    optimizer = build_optimizer(TrainConfig(lora_plus_ratio=16.0), Net().named_parameters())
    factors = {name: group["rate_factor"] for group in optimizer.param_groups for name in group["param_names"]}
    assert factors == {"q.lora_A.default.weight": 1.0, "q.lora_B.default.weight": 16.0}


def test_the_planner_counts_the_bytes_of_the_moments():
    net = Net()
    optimizer = build_optimizer(TrainConfig(optimizer="adamw_8bit"), net.named_parameters())
    run(net, optimizer, range(1))
    matrix = net.q["lora_A"]["default"].weight
    state = optimizer.state[matrix]
    size = sum(state[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2"))
    assert size == matrix.numel() * _MOMENTS["adamw_8bit"]
    assert _MOMENTS["adamw"] == 2 * torch.float32.itemsize
