"""A teacher's distributions for the target tokens of a batch.

Shapes: N targets, in the order of the batch's rows that carry one; D hidden width, V vocabulary, K tokens per target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from finetune.data.batch import Batch


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
