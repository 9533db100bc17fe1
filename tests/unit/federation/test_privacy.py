"""Epsilon of noise: against the closed form of one Gaussian update, and a second formula for several."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import norm

from finetune.config.command_options import ClipOptions
from finetune.federation.clip import clip
from finetune.federation.privacy import epsilon
from finetune.system.errors import ConfigError, MissingExtra

GRID = 2e-3  # nats that the accountant may round up by


def delta_of(epsilon: float, shift: float) -> float:
    """Delta of a Gaussian whose mean moves by `shift` standard deviations (Balle and Wang 2018, theorem 8)."""
    return norm.cdf(shift / 2 - epsilon / shift) - math.exp(epsilon + norm.logcdf(-shift / 2 - epsilon / shift))


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_one_update_has_the_epsilon_of_the_closed_form(noise: float, delta: float):
    found = epsilon(noise, 1, delta)
    # Delta falls with epsilon: the true one lies at most a step of the grid below.
    assert delta_of(found, 2 / noise) <= delta <= delta_of(found - GRID, 2 / noise)


@pytest.mark.parametrize(("noise", "rounds"), [(2.0, 10), (8.0, 100)])
def test_updates_compose_as_one_gaussian_with_the_root_of_their_number(noise: float, rounds: int):
    """Dong, Roth and Su 2022, arXiv:1905.02383, corollary 2; below the bound of Renyi's divergence."""
    found = epsilon(noise, rounds, 1e-5)
    shift = 2 * math.sqrt(rounds) / noise
    assert delta_of(found, shift) <= 1e-5 <= delta_of(found - GRID, shift)
    renyi = min(order * shift**2 / 2 + math.log(1e5) / (order - 1) for order in [1 + k / 100 for k in range(1, 10000)])
    assert found < renyi < 1.5 * found


def test_noise_that_protects_nothing_is_infinite_at_once():
    assert epsilon(0.01, 1, 1e-5) == math.inf
    assert epsilon(0.2, 10, 1e-5) == math.inf
    assert epsilon(0.1, 1, 1e-5) > 280


def test_without_the_extra_the_message_installs_it(monkeypatch: pytest.MonkeyPatch):
    original = builtins.__import__

    def missing(name: str, *args: object) -> object:
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r"finetune-qlora\[federated\]"):
        epsilon(1.0, 1, 1e-5)


def test_clip_prints_epsilon_of_all_updates_and_refuses_it_for_noise_that_is_none_or_known(tmp_path: Path):
    save_file(
        {"base_model.model.q.lora_A.weight": torch.ones(2, 3), "base_model.model.q.lora_B.weight": torch.ones(4, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q"]}))
    given = {"adapter": str(tmp_path), "out": str(tmp_path / "sent"), "noise": 20.0, "rounds": 10, "delta": 1e-5}
    lines: list[str] = []
    clip(ClipOptions(**given), lines.append)
    assert f"epsilon={epsilon(20.0, 10, 1e-5):.4g}" in lines[-1] and "updates=10" in lines[-1]
    for changes in ({"noise": 0.0}, {"seed": 3}):
        with pytest.raises(ConfigError, match="no epsilon"):
            clip(ClipOptions(**given | changes | {"out": str(tmp_path / "other")}), lines.append)
    assert not (tmp_path / "other").exists()
