"""Distillation on a GPU: the placement of the teacher changes nothing, and kernels equal float64."""

from __future__ import annotations

import pytest
import torch

from finetune import train
from finetune.ops.divergence import DIVERGENCES, divergence_
from tests.runs import metrics, result, small_run

pytestmark = pytest.mark.gpu

FEW = ("data.train.0.limit=48", "data.eval.0.limit=8", "train.max_steps=3", "lora.dropout=0", "train.neftune_alpha=0")


def test_a_streamed_and_a_resident_teacher_give_the_same_run(tmp_path):
    for placement in ("resident", "streamed"):
        settings = ("distill.objective=recover", f"distill.teacher.placement={placement}")
        train(small_run(tmp_path / placement, *FEW, *settings))
    for a, b in zip(metrics(tmp_path / "resident"), metrics(tmp_path / "streamed"), strict=True):
        # bf16 states of other batch shapes, in a KL of few nats.
        assert a["loss"] == pytest.approx(b["loss"], rel=2**-5)
    assert result(tmp_path / "resident")["teacher_kl_before"] > 0


def test_on_policy_samples_are_generated_on_the_gpu(tmp_path):
    train(small_run(tmp_path / "run", *FEW, "distill.objective=recover", "distill.on_policy=0.5"))
    assert result(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_equals_float64(kind):
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(64, 32_001, device="cuda") for _ in range(2))
    exact = student.double().requires_grad_()
    log_q, log_p = torch.log_softmax(exact, -1), torch.log_softmax(teacher.double(), -1)
    log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    expected = {
        "forward_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "jsd": 0.3 * (log_p.exp() * (log_p - log_m)).sum(-1) + 0.7 * (log_q.exp() * (log_q - log_m)).sum(-1),
        "skew_kl": (log_p.exp() * (log_p - log_m)).sum(-1),
    }[kind]
    expected.sum().backward()
    nats = divergence_(student, teacher, torch.ones(64, device="cuda"), kind, mix=0.3, temperature=1.0)
    torch.testing.assert_close(nats.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.double(), exact.grad, rtol=1e-4, atol=1e-5 * exact.grad.abs().max().item())
