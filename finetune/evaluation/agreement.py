"""How far a model's probabilities are from a teacher's, on the target tokens of held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.data.batch import Document, build_batch, groups_of
from finetune.evaluation.perplexity import evaluating
from finetune.losses.chunked import chunked_logits
from finetune.losses.cross_entropy import head_of, target_rows
from finetune.losses.divergence import compare
from finetune.losses.hidden import hidden_states
from finetune.losses.signal import Teacher

# Batches that a teacher is asked about at once: one that is read layer by layer is read once for them.
_BATCHES = 16


@dataclass(frozen=True, slots=True)
class Agreement:
    """kl: KL(teacher || model) in nats a target token. top1: share of targets at which both prefer the same token."""

    kl: float
    top1: float
    tokens: int


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
    sums = torch.zeros(3, dtype=torch.float64)
    batches = [build_batch(group, lean=True) for group in groups_of(documents, limit_tokens)]
    with evaluating(model):
        for start in range(0, len(batches), _BATCHES):
            some = batches[start : start + _BATCHES]
            for batch, signal in zip(some, teacher.signals(some), strict=True):
                here = batch.to(device)
                hidden_ND, _, _ = target_rows(hidden_states(model, here), here)
                for logits_NV, rows in chunked_logits(hidden_ND, head_of(model), vocabulary):
                    kl_N, agree_N = compare(signal, logits_NV, rows, vocabulary)
                    sums += torch.stack([kl_N.sum().cpu(), agree_N.sum().cpu(), torch.tensor(len(kl_N))]).double()
    kl, top1, tokens = sum_over_ranks(sums).tolist()
    return Agreement(kl / tokens, top1 / tokens, int(tokens))
