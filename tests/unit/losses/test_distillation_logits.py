"""Distillation losses on logits equal float64 autograd: all teacher targets, with and without cross-entropy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.losses.chunked import chunked_loss
from finetune.losses.distillation import (
    DistillLossWeights,
    TeacherHidden,
    TeacherSamples,
    TeacherTargets,
    TeacherTopK,
    compare,
    distillation_loss,
)
from finetune.ops.limits import LOGITS_VALUES

N, D, V, ROWS = 9, 16, 61, 53  # V ids take part of the tables' 64 and 67 rows


def heads() -> tuple[nn.Linear, nn.Linear]:
    """Heads of student and teacher with different vocabulary sizes."""
    torch.manual_seed(0)
    return nn.Linear(D, 64, bias=False).requires_grad_(False), nn.Linear(24, 67, bias=False).requires_grad_(False)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "hidden": torch.randn(N, D),
        "teacher": 3 * torch.randn(N, 24),
        "labels": torch.randint(0, V, (N,)),
        "factors": torch.rand(N) + 0.5,
        "rows": (torch.arange(N) % 3 > 0).float(),
    }


def teacher_targets_of(kind: str, teacher_logits: Tensor, head: nn.Linear, hidden: Tensor) -> TeacherTargets:
    if kind == "hidden":
        return TeacherHidden(hidden, head)
    probs = teacher_logits.softmax(-1)
    if kind == "top":
        top = probs.topk(5)
        return TeacherTopK(top.indices, top.values.log())
    # All tokens, the last one named twice with half of its probability each: exact targets in sampled form.
    ids = torch.cat([torch.arange(V).expand(N, V), torch.full((N, 1), V - 1)], 1)
    probs = torch.cat([probs, probs[:, -1:] / 2], 1)
    probs[:, V - 1] /= 2
    return TeacherSamples(
        ids, probs.float(), -(probs * torch.log(teacher_logits.softmax(-1)[:, ids[0]])).sum(-1).float(), V
    )


def reference(kind: str, divergence: str, mix: float, temperature: float, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the nats of each row in float64 over the full vocabulary."""
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
    if kind == "top":  # all other tokens are one
        ids = teacher.topk(5).indices
        rest_q, rest_p = (1 - x.exp().gather(1, ids).sum(-1) for x in (log_q, log_p))
        named = log_p.gather(1, ids)
        return (named.exp() * (named - log_q.gather(1, ids))).sum(-1) + rest_p * (rest_p / rest_q).log()
    p, q = log_p.exp(), log_q.exp()
    mixture = (mix * p + (1 - mix) * q).log()
    return {
        "forward_kl": lambda: (p * (log_p - log_q)).sum(-1),
        "reverse_kl": lambda: (q * (log_q - log_p)).sum(-1),
        "jsd": lambda: mix * (p * (log_p - mixture)).sum(-1) + (1 - mix) * (q * (log_q - mixture)).sum(-1),
        "skew_kl": lambda: (p * (log_p - mixture)).sum(-1),
    }[divergence]()


CASES = [
    ("hidden", DistillLossWeights()),
    ("hidden", DistillLossWeights(rows=1.0, teacher=0.2)),
    ("hidden", DistillLossWeights(divergence="reverse_kl", temperature=2.0)),
    ("hidden", DistillLossWeights(rows=0.5, teacher=2.0, divergence="jsd", mix=0.3)),
    ("hidden", DistillLossWeights(rows=1.0, teacher=1.0, divergence="skew_kl", mix=0.1)),
    ("hidden", DistillLossWeights(rows=1.0, teacher=0.0)),
    ("sampled", DistillLossWeights()),
    ("sampled", DistillLossWeights(rows=1.0, teacher=0.2)),
    ("top", DistillLossWeights()),
    ("top", DistillLossWeights(rows=1.0, teacher=0.2)),
]


@pytest.mark.parametrize("chunk_rows", [2, 100])
@pytest.mark.parametrize(("kind", "terms"), CASES)
def test_values_and_gradients_equal_float64_over_the_shared_vocabulary(kind, terms, chunk_rows, monkeypatch):
    monkeypatch.setitem(LOGITS_VALUES, "cpu", V * chunk_rows)
    own, teachers = heads()
    given = inputs()
    exact = {name: value.double() for name, value in given.items() if value.is_floating_point()}
    leaf = exact["hidden"].requires_grad_()
    student = (leaf @ own.weight.double().T)[:, :V]
    teacher = (exact["teacher"] @ teachers.weight.double().T)[:, :V]
    nats = reference(kind, terms.divergence, terms.mix, terms.temperature, student, teacher)
    nll = F.cross_entropy(student, given["labels"], reduction="none")
    expected = ((terms.teacher * nats + terms.rows * exact["rows"] * nll) * exact["factors"]).sum()
    expected.backward()

    targets = teacher_targets_of(kind, teacher.detach(), teachers, given["teacher"])
    hidden = given["hidden"].clone().requires_grad_()
    loss = distillation_loss(
        targets,
        terms,
        given["labels"],
        kl_weight_N=given["factors"],
        ce_weight_N=given["rows"],
        vocabulary=V,
    )
    found = chunked_loss(hidden, own, V, loss)
    found.backward()
    # fp32 sums of 61 terms of up to 10 nats: some 1e-6 of them.
    torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(hidden.grad.double(), leaf.grad, rtol=1e-5, atol=2e-6 * leaf.grad.abs().max().item())


@pytest.mark.parametrize("kind", ["hidden", "sampled", "top"])
def test_compare_returns_forward_kl_and_agreement(kind):
    own, teachers = heads()
    given = inputs()
    student = (given["hidden"].double() @ own.weight.double().T)[:, :V]
    teacher = (given["teacher"].double() @ teachers.weight.double().T)[:, :V]
    targets = teacher_targets_of("hidden" if kind == "hidden" else kind, teacher, teachers, given["teacher"])
    if isinstance(targets, TeacherSamples):  # as a cache has it: most probable first
        order = teacher.argsort(-1, descending=True)
        targets = replace(
            targets,
            ids_NK=order,
            probs_NK=teacher.softmax(-1).gather(1, order).float(),
        )
    kl, agrees = compare(targets, student.float(), slice(0, N), V)
    expected = reference(kind, "forward_kl", 0.0, 1.0, student, teacher)
    torch.testing.assert_close(kl.double(), expected, rtol=2e-6, atol=1e-5)
    assert torch.equal(agrees, student.argmax(-1) == teacher.argmax(-1))


def test_a_server_with_all_tokens_but_one_gives_almost_the_exact_kl_and_never_more():
    """Merging outcomes cannot increase a KL. A single merged outcome loses nothing."""
    torch.manual_seed(2)
    student, teacher = torch.randn(N, V), torch.randn(N, V).double()
    exact = reference("hidden", "forward_kl", 0.0, 1.0, student.double(), teacher)
    found = []
    for kept in (1, 4, 16, V - 1):
        top = teacher.softmax(-1).topk(kept)
        targets = TeacherTopK(top.indices, top.values.log().float())
        found.append(compare(targets, student.clone(), slice(0, N), V)[0].double())
    assert all((more >= less - 1e-6).all() for less, more in zip(found, [*found[1:], exact], strict=True))
    torch.testing.assert_close(found[-1], exact, rtol=1e-5, atol=1e-5)
