"""Divergences equal the generalized Jensen-Shannon divergence of TRL: values and gradients."""

from __future__ import annotations

import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from finetune.ops.divergence import divergence_


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_loss_and_gradient_equal_those_of_trl(beta, temperature):
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(2, 9, 331, generator=generator)
    teacher = student + torch.randn(2, 9, 331, generator=generator)
    labels = torch.where(torch.rand(2, 9, generator=generator) < 0.6, 5, -100)
    leaf = student.double().requires_grad_()
    theirs = GKDTrainer.generalized_jsd_loss(leaf, teacher.double(), labels, beta, temperature)
    (their_gradient,) = torch.autograd.grad(theirs, leaf)

    targets = labels != -100
    kind = {0: "forward_kl", 1: "reverse_kl"}.get(beta, "jsd")
    gradient = teacher[targets]
    factors = torch.full((len(gradient),), 1 / len(gradient))
    nats = divergence_(student[targets], gradient, factors, kind, mix=beta, temperature=temperature)
    torch.testing.assert_close((nats * factors).sum().double(), theirs.detach(), rtol=1e-6, atol=0)
    error = (gradient - their_gradient[targets]).abs().amax()
    assert error <= 1e-6 * their_gradient.abs().amax()
    assert not their_gradient[~targets].any()
