"""Perplexity and token accuracy on the target tokens of held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.data.batch import build_batch, groups_of
from finetune.data.documents import Document
from finetune.losses.cross_entropy import score


@dataclass(frozen=True, slots=True)
class Perplexity:
    """loss: nats a target token. accuracy: share of target tokens that greedy decoding would give. tokens: targets."""

    loss: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the block, then every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: nn.Module,
    documents: Sequence[Document],
    *,
    limit_tokens: int,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Perplexity:
    """Score documents in batches of at most `limit_tokens` tokens (a longer document goes alone).

    sum_over_ranks: adds a tensor up over all ranks, where each rank holds a part of the documents.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64)
    with evaluating(model):
        for batch in groups_of(documents, limit_tokens):
            result = score(model, build_batch(batch).to(device))
            sums += torch.tensor([float(result.nll), float(result.correct), result.tokens], dtype=torch.float64)
    nll, correct, tokens = sum_over_ranks(sums).tolist()
    return Perplexity(nll / tokens, correct / tokens, int(tokens))
