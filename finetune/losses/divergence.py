"""Distillation losses on logits, for the chunked engine.

Shapes: N rows that carry a target, V vocabulary, K tokens kept of a teacher's distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.config.schema import DistillConfig
from finetune.losses.chunked import ChunkLoss, logits_of
from finetune.losses.teacher_targets import TeacherHidden, TeacherSamples, TeacherTargets, TeacherTopK
from finetune.ops.bucketed_kl import bucketed_kl_
from finetune.ops.cross_entropy import cross_entropy_
from finetune.ops.divergence import divergence_, sampled_kl_

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
    if isinstance(targets, TeacherSamples):
        return _sampled(targets, terms, labels_N, kl_weight_N, ce_weight_N)
    against = _dense(targets, terms, vocabulary) if isinstance(targets, TeacherHidden) else _bucketed(targets)

    def loss(logits_NV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        factors = kl_weight_N[rows] * terms.teacher
        nats_N, gradient_NV = against(logits_NV, rows, factors)
        total = (nats_N * factors).sum()
        if not terms.rows:
            return total, gradient_NV
        factors = kl_weight_N[rows] * ce_weight_N[rows]
        nll_N = cross_entropy_(logits_NV, labels_N[rows], factors)
        return total + (nll_N * factors).sum(), logits_NV.add_(gradient_NV)

    return loss


# (logits [n, V], rows, weights [n]) -> unweighted nats [n] and the weighted gradient, in a buffer that the next call
# overwrites.
_Against = Callable[[Tensor, slice, Tensor], tuple[Tensor, Tensor]]


def _dense(targets: TeacherHidden, terms: DistillLossWeights, vocabulary: int) -> _Against:
    teacher_NV: Tensor | None = None

    def against(logits_NV: Tensor, rows: slice, factors: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal teacher_NV
        teacher_NV = logits_of(targets.hidden_ND[rows], targets.head, vocabulary, teacher_NV)
        nats_N = divergence_(
            logits_NV, teacher_NV, factors, terms.divergence, mix=terms.mix, temperature=terms.temperature
        )
        return nats_N, teacher_NV

    return against


def _bucketed(targets: TeacherTopK) -> _Against:
    def against(logits_NV: Tensor, rows: slice, factors: Tensor) -> tuple[Tensor, Tensor]:
        own_NV = logits_NV.clone()
        return bucketed_kl_(own_NV, targets.ids_NK[rows], targets.log_probs_NK[rows], factors), own_NV

    return against


def _sampled(
    targets: TeacherSamples, terms: DistillLossWeights, labels_N: Tensor, kl_weight_N: Tensor, ce_weight_N: Tensor
) -> ChunkLoss:
    """The label is one more sample of each row: both losses are cross-entropies with one softmax."""

    def loss(logits_NV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        ids_NK = torch.cat([labels_N[rows, None], targets.ids_NK[rows]], 1)
        probs_NK = torch.cat([ce_weight_N[rows, None], targets.probs_NK[rows] * terms.teacher], 1)
        cross_N = sampled_kl_(logits_NV, ids_NK, probs_NK, kl_weight_N[rows])
        return ((cross_N - terms.teacher * targets.entropy_N[rows]) * kl_weight_N[rows]).sum(), logits_NV

    return loss


def compare(targets: TeacherTargets, logits_NV: Tensor, rows: slice, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) in nats [n], fp32, and whether both have the same most probable token [n].

    Overwrites the logits. With TeacherSamples the KL is right on average. With TeacherTopK all other tokens are one
    outcome.
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
