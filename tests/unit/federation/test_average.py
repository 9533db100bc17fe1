"""Averages equal the dense mean of the updates in float64, and their errors and residuals are measured against it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from finetune.federation.average import factor_error, mean_tensors, normalized, residual

SCALINGS = {"q": 2.0, "v": 0.5}
WEIGHTS = normalized([3.0, 1.0, 2.0])
SHAPES = {"q": (12, 9), "v": (5, 9)}
RANK = 3


def party(seed: int, *, shared_a: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, inputs) in SHAPES.items():
        of_a = torch.Generator().manual_seed(7) if shared_a else generator
        tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, inputs, generator=of_a)
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    return tensors


def update(tensors: dict[str, Tensor], module: str) -> Tensor:
    b, a = (tensors[f"{module}.lora_{side}.weight"].double() for side in "BA")
    return SCALINGS[module] * (b @ a)


def mean_update(parties: list[dict[str, Tensor]], module: str) -> Tensor:
    return sum((w * update(p, module) for w, p in zip(WEIGHTS, parties, strict=True)), torch.zeros(SHAPES[module]))


def test_with_one_a_the_mean_of_b_is_the_mean_of_the_updates():
    parties = [party(seed, shared_a=True) for seed in range(3)]
    means = mean_tensors(parties, WEIGHTS)
    for module in SHAPES:
        torch.testing.assert_close(update(means, module), mean_update(parties, module), rtol=0, atol=1e-5)
        exact = mean_tensors([{k: v.double() for k, v in p.items()} for p in parties], WEIGHTS)
        torch.testing.assert_close(update(exact, module), mean_update(parties, module), rtol=0, atol=1e-14)
        assert torch.equal(means[f"{module}.lora_A.weight"], parties[0][f"{module}.lora_A.weight"])
    assert factor_error(parties, WEIGHTS, SCALINGS).total == 0


def test_the_error_of_two_means_is_that_of_dense_matrices():
    parties = [party(seed, shared_a=False) for seed in range(3)]
    means = mean_tensors([{k: v.double() for k, v in p.items()} for p in parties], WEIGHTS)
    error = factor_error(parties, WEIGHTS, SCALINGS)
    missed = {m: (update(means, m) - mean_update(parties, m)).norm() for m in SHAPES}
    wanted = {m: mean_update(parties, m).norm() for m in SHAPES}
    whole = torch.stack(list(missed.values())).norm() / torch.stack(list(wanted.values())).norm()
    assert error.total == pytest.approx(float(whole), rel=1e-12)
    assert error.worst == pytest.approx(max(float(missed[m] / wanted[m]) for m in SHAPES), rel=1e-12)
    assert error.worst == pytest.approx(float(missed[error.worst_module] / wanted[error.worst_module]), rel=1e-12)
    assert error.total > 0.1


def test_the_mean_and_its_residual_are_the_mean_of_the_updates():
    parties = [party(seed, shared_a=False) for seed in range(3)]
    means, rest = mean_tensors(parties, WEIGHTS), residual(parties, WEIGHTS, SHAPES)
    for module in SHAPES:
        assert len(rest[f"{module}.lora_A.weight"]) == 2 * RANK
        whole = update(means, module) + update(rest, module)
        torch.testing.assert_close(whole, mean_update(parties, module), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_party_keeps_its_bits(dtype: torch.dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in party(0, shared_a=False).items()}
    means = mean_tensors([tensors], [1.0])
    assert all(torch.equal(means[name], tensors[name]) and means[name].dtype == dtype for name in tensors)


def test_the_sum_of_weights_has_no_order():
    weights = [0.1, 0.7, 1e-9, 3.3, 0.2]
    for order in itertools.permutations(range(5)):
        found = normalized([weights[i] for i in order])
        assert [found[order.index(i)] for i in range(5)] == normalized(weights)
