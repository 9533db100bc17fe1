"""How far a model's probabilities are from a teacher's, on the target tokens of held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.data.batch import build_batch, groups_of
from finetune.data.documents import Document
from finetune.evaluation.perplexity import evaluating
from finetune.losses.chunked import chunked_logits
from finetune.losses.cross_entropy import head_of, target_rows
from finetune.losses.divergence import compare
from finetune.losses.hidden_states import hidden_states
from finetune.losses.teacher_targets import Teacher
from finetune.ops.limits import TEACHER_BATCHES

# A percentile over ranks comes from counts in bins of the logarithm: from 1e-9 nats on, each 2 % wide, up to 4e8.
_LOWEST, _BIN_LOG, _BINS = 1e-9, math.log(1.02), 2048


@dataclass(frozen=True, slots=True)
class Agreement:
    """kl: KL(teacher || model) in nats a target token. top1: share of targets at which both prefer the same token.

    kl_p99: nats below which 99 % of the targets are, within 1 % of it.
    """

    kl: float
    top1: float
    tokens: int
    kl_p99: float


@torch.no_grad()
def agreement(
    model: nn.Module,
    teacher: Teacher,
    documents: Sequence[Document],
    vocabulary: int,
    *,
    limit_tokens: int,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Agreement:
    """Compare over documents in batches of at most `limit_tokens` tokens (a longer document goes alone).

    vocabulary: ids that both sides know. sum_over_ranks: as for `evaluate`.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(3 + _BINS, dtype=torch.float64)
    batches = [build_batch(group, share_prefixes=True) for group in groups_of(documents, limit_tokens)]
    with evaluating(model):
        for start in range(0, len(batches), TEACHER_BATCHES):
            some = batches[start : start + TEACHER_BATCHES]
            for batch, teacher_targets in zip(some, teacher.targets_for(some), strict=True):
                here = batch.to(device)
                hidden_ND, _, _ = target_rows(hidden_states(model, here), here)
                for logits_NV, rows in chunked_logits(hidden_ND, head_of(model), vocabulary):
                    kl_N, agree_N = compare(teacher_targets, logits_NV, rows, vocabulary)
                    totals = torch.stack([kl_N.sum().cpu(), agree_N.sum().cpu(), torch.tensor(len(kl_N))])
                    sums += torch.cat([totals.double(), _histogram(kl_N.cpu())])
    sums = sum_over_ranks(sums)
    kl, top1, tokens = sums[:3].tolist()
    return Agreement(kl / tokens, top1 / tokens, int(tokens), _percentile(sums[3:], 0.99))


def _histogram(kl_N: Tensor) -> Tensor:
    """How many of the values are in each bin: of equal width in their logarithm, and what adds up over ranks."""
    places_N = ((kl_N.double().clamp(min=_LOWEST) / _LOWEST).log() / _BIN_LOG).long().clamp_(max=_BINS - 1)
    return torch.bincount(places_N, minlength=_BINS).double()


def _percentile(counts: Tensor, share: float) -> float:
    """The middle of the bin that the value is in; of the lowest bin, which holds all from 0 on, 0."""
    reached = counts.cumsum(0)
    place = int(torch.searchsorted(reached, share * reached[-1] - 1e-9))
    return _LOWEST * math.exp((place + 0.5) * _BIN_LOG) if place else 0.0
