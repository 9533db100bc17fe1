"""The distillation loss of packed documents equals that of each document alone, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune.data.batch import Batch, build_batch, dummy_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.distill.resident import ResidentTeacher
from finetune.losses.cross_entropy import CrossEntropy
from finetune.losses.distillation import Distillation, DistillLossWeights, TeacherTargets
from tests.models import random_qwen2

CPU = torch.device("cpu")
V = 90  # of 97 rows


def documents(lengths: Sequence[int], own: Sequence[int] = ()) -> list[Document]:
    rng = np.random.default_rng(0)
    result = []
    for i, length in enumerate(lengths):
        ids = rng.integers(0, V, length).astype(np.int32)
        labels = np.where(rng.random(length) < 0.6, np.roll(ids, -1), IGNORE_INDEX).astype(np.int32)
        labels[-1] = IGNORE_INDEX
        weights = rng.choice([0.5, 2.0], length).astype(np.float32) if i == 1 else None
        result.append(Document(ids, labels, f"row {i}", weights, student_generated=i in own))
    return result


def reference(docs: list[Document], terms: DistillLossWeights) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    student, teacher = random_qwen2("eager", torch.float64), random_qwen2("eager", torch.float64, seed=1)
    total = torch.zeros((), dtype=torch.float64)
    for doc in docs:
        ids = torch.tensor(doc.ids[None].astype(np.int64))
        targets = doc.labels != IGNORE_INDEX
        weights = torch.tensor(np.ones(len(doc)) if doc.weights is None else doc.weights.astype(np.float64))[targets]
        out = student.model(ids).last_hidden_state[0, targets]
        with torch.no_grad():
            taught = teacher.model(ids).last_hidden_state[0, targets]
        log_q = torch.log_softmax(student.lm_head(out)[:, :V], -1)
        log_p = torch.log_softmax(teacher.lm_head(taught)[:, :V], -1)
        nats = terms.teacher * (log_p.exp() * (log_p - log_q)).sum(-1) + terms.hidden * (out - taught).square().mean(-1)
        if not doc.student_generated:
            labels = torch.tensor(doc.labels.astype(np.int64))[targets]
            nats = nats + terms.rows * F.nll_loss(log_q, labels, reduction="none")
        total = total + (nats * weights).sum()
    total.backward()
    return total.detach(), {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("attn", ["segmented", "eager"])
@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize(
    "terms",
    [DistillLossWeights(), DistillLossWeights(rows=1.0, teacher=0.3), DistillLossWeights(teacher=1.0, hidden=0.7)],
)
def test_packed_documents_give_the_loss_and_gradients_of_each_alone(attn, share_prefixes, terms):
    docs = documents([7, 30, 64, 12], own=[2])
    expected, gradients = reference(docs, terms)
    model, teacher = random_qwen2(attn), ResidentTeacher(random_qwen2("segmented", seed=1), CPU)
    model.lm_head.weight.requires_grad_(False)
    loss = Distillation(model, terms, V)
    batch = build_batch(docs, share_prefixes=share_prefixes and attn == "segmented")
    loss.expect(teacher.targets_for([batch]))
    total = loss(batch)
    total.backward()
    torch.testing.assert_close(total.detach().double(), expected, rtol=1e-5, atol=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), gradients[name], rtol=1e-4, atol=5e-5, msg=name)


def test_a_teacher_equal_to_the_student_gives_zero_and_labels_alone_give_cross_entropy():
    docs = documents([7, 30])
    batch = build_batch([replace(doc, weights=None) for doc in docs])
    teacher = ResidentTeacher(random_qwen2(), CPU)
    model = random_qwen2()
    loss = Distillation(model, DistillLossWeights(), 97)
    loss.expect(teacher.targets_for([batch]))
    loss(batch).backward()
    # q - p of equal logits is exactly 0: the kernel takes differences of logits, not of logarithms.
    assert all(not p.grad.any() for p in model.parameters())
    loss = Distillation(model, DistillLossWeights(rows=1.0, teacher=0.0), 97)
    loss.expect(teacher.targets_for([batch]))
    torch.testing.assert_close(loss(batch).detach(), CrossEntropy(model)(batch).detach(), rtol=1e-6, atol=1e-5)


def test_a_batch_without_targets_gives_zero_and_reaches_every_parameter():
    model, teacher = random_qwen2(), ResidentTeacher(random_qwen2(seed=1), CPU)
    batch = dummy_batch(documents([9])[0])
    loss = Distillation(model, DistillLossWeights(rows=1.0, hidden=1.0), V)
    loss.expect(teacher.targets_for([batch]))
    total = loss(batch)
    total.backward()
    assert total.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_loss_does_not_contain_the_teacher_and_calls_it_lazily():
    asked: list[int] = []

    class Lazy:
        def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherTargets]:
            teacher = ResidentTeacher(random_qwen2(seed=1), CPU)
            for batch in batches:
                asked.append(batch.tokens)
                yield from teacher.targets_for([batch])

    model = random_qwen2()
    loss = Distillation(model, DistillLossWeights(), V)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in model.parameters()}
    batches = [build_batch([doc]) for doc in documents([7, 30])]
    loss.expect(Lazy().targets_for(batches))
    assert asked == []
    loss(batches[0])
    assert asked == [7]
