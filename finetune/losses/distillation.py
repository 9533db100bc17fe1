"""Learning from a teacher over target tokens, without logits for the tokens that carry no target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from finetune.data.batch import Batch
from finetune.data.encoded import IGNORE_INDEX
from finetune.losses.chunked import chunked_loss
from finetune.losses.cross_entropy import head_of, target_rows
from finetune.losses.divergence import DistillLossWeights, distillation_loss
from finetune.losses.hidden_states import hidden_states
from finetune.losses.teacher_targets import TeacherHidden, TeacherTargets


class Distillation(nn.Module):
    """The training loss as a module, so that DDP can wrap model and loss in one. The teacher is no part of it.

    vocabulary: ids that both sides know, from 0 on; rows beyond (models are padded to a round number) take no part.
    forward(batch) returns the sum over the batch's targets, each times its weight, fp32; the caller divides by the
    global count of targets. It takes the next of the signals that `expect` announced.
    """

    def __init__(self, model: nn.Module, terms: DistillLossWeights, vocabulary: int, neftune_alpha: float = 0.0):
        super().__init__()
        self.model = model
        self.terms = terms
        self.vocabulary = vocabulary
        self.neftune_alpha = neftune_alpha
        self._teacher_targets: Iterator[TeacherTargets] = iter(())

    def expect(self, targets_for: Iterable[TeacherTargets]) -> None:
        """The teacher's signals for the batches that come, in their order; taken as they are needed."""
        self._teacher_targets = iter(targets_for)

    def forward(self, batch: Batch) -> Tensor:
        teacher_targets = next(self._teacher_targets)
        hidden_TD = hidden_states(self.model, batch, self.neftune_alpha)
        hidden_ND, labels_N, weights_N = target_rows(hidden_TD, batch)
        kl_weight_N = torch.ones(len(labels_N), device=hidden_ND.device) if weights_N is None else weights_N
        ce_weight_N = torch.ones_like(kl_weight_N)
        if batch.student_generated is not None:  # what the student wrote itself is no example to follow
            ce_weight_N -= batch.student_generated[batch.labels[0] != IGNORE_INDEX].float()
        loss = distillation_loss(teacher_targets, self.terms, labels_N, kl_weight_N, ce_weight_N, self.vocabulary)
        total = chunked_loss(hidden_ND, head_of(self.model), self.vocabulary, loss)
        if self.terms.hidden and isinstance(teacher_targets, TeacherHidden):
            squares_N = (hidden_ND.float() - teacher_targets.hidden_ND.float()).square().mean(-1)
            total = total + self.terms.hidden * (squares_N * kl_weight_N).sum()
        return total
