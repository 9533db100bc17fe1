"""Knowledge distillation over target tokens, which alone get logits: a teacher's distributions, and the losses.

Shapes: N rows that carry a target, in the order of the batch; D hidden width, V vocabulary, K tokens of a teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.config.schema import DistillConfig
from finetune.data.batch import Batch
from finetune.losses.chunked import ChunkLoss, chunked_loss, logits_of
from finetune.losses.cross_entropy import head_of
from finetune.losses.hidden_states import copy_together, target_states
from finetune.ops.cross_entropy import cross_entropy_
from finetune.ops.divergence import bucketed_kl_, divergence_, sampled_kl_
from finetune.parallel.sharding import whole


@dataclass(frozen=True, slots=True)
class TeacherHidden:
    """The full distributions, as final normed hidden states [N, D] and the head that computes their logits."""

    hidden_ND: Tensor
    head: nn.Module


@dataclass(frozen=True, slots=True)
class TeacherSamples:
    """An unbiased sample of each distribution: its most probable tokens, and some drawn from the others.

    ids_NK: int64, a token may repeat. probs_NK: fp32 weight of each sample, summing to 1. entropy_N: entropy of the
    full distribution, in nats. top_k: the first columns hold the most probable tokens in order, with their own
    probabilities; the drawn tokens share the remaining probability.
    Source: Anshumann et al. 2025, arXiv:2503.16870, with the most probable tokens kept.
    """

    ids_NK: Tensor
    probs_NK: Tensor
    entropy_N: Tensor
    top_k: int


@dataclass(frozen=True, slots=True)
class TeacherTopK:
    """The most probable tokens only, as a server returns them; all other tokens count as one outcome.

    ids_NK: int64, without repetition. log_probs_NK: fp32, in nats.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor


TeacherTargets = TeacherHidden | TeacherSamples | TeacherTopK


class Teacher(Protocol):
    """A source of teacher targets: a resident model, a model streamed layer by layer, or a cache folder."""

    def targets_for(self, batches: Sequence[Batch]) -> Iterable[TeacherTargets]:
        """Return the targets of each batch, in the batches' order."""
        ...


_DEFAULT_WEIGHTS = {"sft+anchor": 0.2, "distill": 1.0}


@dataclass(frozen=True, slots=True)
class DistillLossWeights:
    """Weights and options of the terms of a distillation loss.

    rows: cross-entropy with the labels. teacher: divergence from the teacher. hidden: mean squared difference of hidden
    states. mix, temperature: options of the divergence.
    """

    rows: float = 0.0
    teacher: float = 1.0
    hidden: float = 0.0
    divergence: str = "forward_kl"
    mix: float = 0.0
    temperature: float = 1.0

    @staticmethod
    def of(cfg: DistillConfig) -> DistillLossWeights:
        """Build the loss weights of a config."""
        recover = cfg.objective == "recover"
        return DistillLossWeights(
            rows=0.0 if recover else 1.0,
            teacher=_DEFAULT_WEIGHTS.get(cfg.objective, 1.0) if cfg.weight is None else cfg.weight,
            hidden=cfg.hidden_weight,
            divergence=cfg.divergence,
            mix={"jsd": cfg.beta, "skew_kl": cfg.alpha}.get(cfg.divergence, 0.0),
            temperature=cfg.temperature,
        )


def distillation_loss(
    targets: TeacherTargets,
    terms: DistillLossWeights,
    labels_N: Tensor,
    *,
    kl_weight_N: Tensor,
    ce_weight_N: Tensor,
    vocabulary: int,
) -> ChunkLoss:
    """Build the loss of a chunk of logits: cross-entropy and divergence, each times its weight in `terms`.

    With TeacherSamples, value and gradient of the divergence are right on average over the draws.

    Args:
        targets: the teacher's distributions of the N rows.
        terms: weights of the loss terms.
        labels_N: the labels.
        kl_weight_N: weight of each row's divergence.
        ce_weight_N: weight of each row's cross-entropy, relative to `kl_weight_N`.
        vocabulary: V, shared by teacher and student.
    """
    ce_weight_N = ce_weight_N * terms.rows
    teacher_NV: Tensor | None = None

    def loss(logits_NV: Tensor, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        nonlocal teacher_NV
        if isinstance(targets, TeacherSamples):
            # The label is one more sample of each row: both losses are cross-entropies with one softmax.
            ids_NK = torch.cat([labels_N[rows, None], targets.ids_NK[rows]], 1)
            probs_NK = torch.cat([ce_weight_N[rows, None], targets.probs_NK[rows] * terms.teacher], 1)
            cross_N = sampled_kl_(logits_NV, ids_NK, probs_NK, kl_weight_N[rows])
            return ((cross_N - terms.teacher * targets.entropy_N[rows]) * kl_weight_N[rows]).sum(), logits_NV
        factors = kl_weight_N[rows] * terms.teacher
        if isinstance(targets, TeacherHidden):
            gradient_NV = teacher_NV = logits_of(targets.hidden_ND[rows], targets.head, vocabulary, teacher_NV)
            nats_N = divergence_(
                logits_NV, gradient_NV, factors, terms.divergence, mix=terms.mix, temperature=terms.temperature
            )
        else:
            gradient_NV = logits_NV.clone()
            nats_N = bucketed_kl_(gradient_NV, targets.ids_NK[rows], targets.log_probs_NK[rows], factors)
        total = (nats_N * factors).sum()
        if not terms.rows:
            return total, gradient_NV
        factors = kl_weight_N[rows] * ce_weight_N[rows]
        nll_N = cross_entropy_(logits_NV, labels_N[rows], factors)
        return total + (nll_N * factors).sum(), logits_NV.add_(gradient_NV)

    return loss


class Distillation(nn.Module):
    """The training loss as a module that contains the model. It does not contain the teacher.

    forward(batch) returns the weighted sum over the batch's targets, fp32; the caller divides by the global target
    count. Each call consumes the next teacher targets given to `expect`. vocabulary: number of token ids that teacher
    and student share, from 0 on; padding rows beyond them are not used.
    """

    def __init__(self, model: nn.Module, terms: DistillLossWeights, vocabulary: int, neftune_alpha: float = 0.0):
        super().__init__()
        self.model = model
        self.terms = terms
        self.vocabulary = vocabulary
        self.neftune_alpha = neftune_alpha
        self._teacher_targets: Iterator[TeacherTargets] = iter(())

    def expect(self, teacher_targets: Iterable[TeacherTargets]) -> None:
        """Set the teacher targets of the next batches, in order; they are computed when needed."""
        self._teacher_targets = iter(teacher_targets)

    def forward(self, batch: Batch) -> Tensor:
        targets = next(self._teacher_targets)
        student = target_states(self.model, batch, self.neftune_alpha)
        hidden_ND, labels_N, weights_N = student.hidden_ND, student.labels_N, student.weights_N
        kl_weight_N = torch.ones(len(labels_N), device=hidden_ND.device) if weights_N is None else weights_N
        ce_weight_N = torch.ones_like(kl_weight_N)
        if batch.student_generated is not None:  # the student does not learn its own samples as labels
            ce_weight_N -= copy_together([batch.student_generated[batch.targets].float()], hidden_ND.device)[0]
        loss = distillation_loss(
            targets, self.terms, labels_N, kl_weight_N=kl_weight_N, ce_weight_N=ce_weight_N, vocabulary=self.vocabulary
        )
        with whole_head(targets):
            total = chunked_loss(hidden_ND, head_of(self.model), self.vocabulary, loss)
        if self.terms.hidden and isinstance(targets, TeacherHidden):
            squares_N = (hidden_ND.float() - targets.hidden_ND.float()).square().mean(-1)
            total = total + self.terms.hidden * (squares_N * kl_weight_N).sum()
        return total


def whole_head(targets: TeacherTargets) -> AbstractContextManager[None]:
    """Hold the teacher's head, which ranks may share, while its logits are computed."""
    return whole(targets.head) if isinstance(targets, TeacherHidden) else nullcontext()


def compare(targets: TeacherTargets, logits_NV: Tensor, rows: slice, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) in nats [n], fp32, and whether both have the same most probable token [n].

    Call it inside `whole_head`. Overwrites the logits. With TeacherSamples the KL is right on average. With TeacherTopK
    all other tokens are one outcome.
    """
    best_N = logits_NV.argmax(-1)
    kl_weight_N = torch.ones(len(best_N), device=logits_NV.device)
    if isinstance(targets, TeacherHidden):
        teacher_NV = logits_of(targets.hidden_ND[rows], targets.head, vocabulary)
        agree_N = teacher_NV.argmax(-1) == best_N
        return divergence_(logits_NV, teacher_NV, kl_weight_N, "forward_kl", mix=0.0, temperature=1.0), agree_N
    agree_N = targets.ids_NK[rows, 0] == best_N
    if isinstance(targets, TeacherSamples):
        cross_N = sampled_kl_(logits_NV, targets.ids_NK[rows], targets.probs_NK[rows], kl_weight_N)
        return cross_N - targets.entropy_N[rows], agree_N
    return bucketed_kl_(logits_NV, targets.ids_NK[rows], targets.log_probs_NK[rows], kl_weight_N), agree_N
