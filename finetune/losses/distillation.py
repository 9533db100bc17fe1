"""Knowledge distillation over target tokens; tokens without a target get no logits."""

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
    """The training loss as a module, so that DDP can wrap model and loss together. It does not contain the teacher.

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
        teacher_targets = next(self._teacher_targets)
        hidden_TD = hidden_states(self.model, batch, self.neftune_alpha)
        hidden_ND, labels_N, weights_N = target_rows(hidden_TD, batch)
        kl_weight_N = torch.ones(len(labels_N), device=hidden_ND.device) if weights_N is None else weights_N
        ce_weight_N = torch.ones_like(kl_weight_N)
        if batch.student_generated is not None:  # the student does not learn its own samples as labels
            ce_weight_N -= batch.student_generated[batch.labels[0] != IGNORE_INDEX].float()
        loss = distillation_loss(
            teacher_targets,
            self.terms,
            labels_N,
            kl_weight_N=kl_weight_N,
            ce_weight_N=ce_weight_N,
            vocabulary=self.vocabulary,
        )
        total = chunked_loss(hidden_ND, head_of(self.model), self.vocabulary, loss)
        if self.terms.hidden and isinstance(teacher_targets, TeacherHidden):
            squares_N = (hidden_ND.float() - teacher_targets.hidden_ND.float()).square().mean(-1)
            total = total + self.terms.hidden * (squares_N * kl_weight_N).sum()
        return total
