"""What a teacher says about the target tokens of a batch.

Shapes: N targets, in the order of the batch's rows that carry one; D hidden width, V vocabulary, K tokens kept of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from finetune.data.batch import Batch


@dataclass(frozen=True, slots=True)
class TeacherHidden:
    """Everything: the final normed hidden states [N, D], and the head that makes logits of them."""

    hidden_ND: Tensor
    head: nn.Module


@dataclass(frozen=True, slots=True)
class TeacherSamples:
    """An unbiased draw from each distribution: its most probable tokens, and some of the others.

    ids_NK: int64, a token may repeat. probs_NK: fp32, what each stands for; they add up to 1. entropy_N: of the whole
    distribution, in nats. head: so many of the K come first, most probable first, each with its own probability; the
    others were drawn and share what is left.
    Source: the sparse sampling of Anshumann et al. 2025, arXiv:2503.16870, with the head kept.
    """

    ids_NK: Tensor
    probs_NK: Tensor
    entropy_N: Tensor
    top_k: int


@dataclass(frozen=True, slots=True)
class TeacherTopK:
    """The most probable tokens alone, as a server gives them; all others count as one, of which only the mass is known.

    ids_NK: int64, each once. log_probs_NK: fp32, in nats.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor


TeacherTargets = TeacherHidden | TeacherSamples | TeacherTopK


class Teacher(Protocol):
    """Whatever says something about batches: a model in memory, one that is read layer by layer, a folder."""

    def targets_for(self, batches: Sequence[Batch]) -> Iterable[TeacherTargets]:
        """A signal for each batch, in order; its entries are those of the batch's targets."""
        ...
