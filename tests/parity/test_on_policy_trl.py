"""On-policy distillation equals TRL's GKD loss over the completions, and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from finetune.data.batch import build_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.distill.on_policy import OnPolicySampler
from finetune.distill.resident import ResidentTeacher
from finetune.evaluation.generation import sample_answers
from finetune.losses.distillation import Distillation, DistillLossWeights
from tests.models import random_qwen2

WORDS, STOP = 97, 5


class Rows:
    """A sampler of one step of rows of unequal length, two a sequence."""

    digest = ""

    def step_batches(self, step: int) -> list[list[Document]]:
        rng = np.random.default_rng(step)
        documents = []
        for length in (9, 14, 6, 11):
            ids = rng.integers(WORDS, size=length, dtype=np.int32)
            labels = np.where(np.arange(length) == length - 3, np.roll(ids, -1), IGNORE_INDEX).astype(np.int32)
            documents.append(Document(ids, labels, f"rows:{length}"))
        return [documents[:2], documents[2:]]

    def steps_for(self, epochs: float) -> int:
        return 1

    def close(self) -> None:
        """Nothing works in the background."""


def written(student) -> list[list[Document]]:
    def write(prompts, draws):
        options = {"stop_ids": (STOP,), "vocabulary": WORDS, "temperature": 1.0}
        return [answer.ids for [answer] in sample_answers(student, prompts, [d[None] for d in draws], **options)]

    return OnPolicySampler(Rows(), write, 1.0, 8, 64, seed=3).step_batches(0)


def theirs(student, teacher, documents: list[Document], beta: float) -> tuple[float, dict[str, torch.Tensor]]:
    """TRL's loss, a mean over completion tokens, on rows padded on the right as its trainer hands them over."""
    longest = max(map(len, documents))
    ids = torch.tensor([[*d.ids.tolist(), *[0] * (longest - len(d))] for d in documents])
    mask = torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in documents])
    labels = torch.full_like(ids, -100)
    for row, document in enumerate(documents):
        for t in np.flatnonzero(document.labels != IGNORE_INDEX):
            labels[row, t + 1] = ids[row, t + 1]
    with torch.no_grad():
        teacher_logits = teacher(input_ids=ids, attention_mask=mask).logits[:, :-1]
    logits = student(input_ids=ids, attention_mask=mask).logits[:, :-1]
    loss = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, labels[:, 1:], beta=beta)
    student.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "beta"), [("jsd", 0.5), ("reverse_kl", 1.0)])
@pytest.mark.parametrize("rows", [0.0, 1.0], ids=["divergence", "with cross-entropy"])
def test_the_divergence_of_student_answers_equals_trls(kind, beta, rows):
    student, teacher = random_qwen2(seed=0), random_qwen2(seed=1).eval().requires_grad_(False)
    sequences = written(student)
    documents = [document for sequence in sequences for document in sequence]
    targets = sum(document.target_tokens for document in documents)
    assert all(document.student_generated for document in documents) and targets > 12
    their_loss, their_gradients = theirs(student, teacher, documents, beta)

    terms = DistillLossWeights(rows=rows, teacher=1.0, divergence=kind, mix=beta if kind == "jsd" else 0.0)
    loss = Distillation(student, terms, WORDS)
    student.zero_grad()
    batches = [build_batch(sequence, share_prefixes=True) for sequence in sequences]
    loss.expect(ResidentTeacher(teacher, torch.device("cpu")).targets_for(batches))
    total = torch.stack([loss(batch) for batch in batches]).sum() / targets
    total.backward()
    assert total.item() == pytest.approx(their_loss, rel=1e-5)
    ours = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert ours.keys() == their_gradients.keys()
    for name, gradient in ours.items():
        # fp32 sums in another order: 1e-5 of a tensor's largest entry.
        scale = their_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, their_gradients[name], rtol=0, atol=1e-5 * scale, msg=name)
