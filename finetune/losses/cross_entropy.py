"""Cross-entropy over target tokens; tokens without a target get no logits.

Shapes: T tokens of a packed batch, N of them with a target, D hidden width, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.data.batch import Batch
from finetune.losses.chunked import ChunkLoss, chunked_logits, chunked_loss
from finetune.losses.hidden_states import base_of, target_states
from finetune.models.decoder import text_config
from finetune.ops.cross_entropy import cross_entropy_


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over a batch's target tokens, fp32 on the model's device: nats, correct predictions, number of tokens."""

    nll: Tensor
    correct: Tensor
    tokens: int


def head_of(model: nn.Module) -> nn.Module:
    """Return the output head of a model, with its adapter. Raises: TypeError if the model has none."""
    head = base_of(model).get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(base_of(model)).__name__} has no output head, so it has no language-model loss")
    return head


def vocabulary_rows(model: nn.Module) -> int:
    """Return the number of ids that the head of a model scores."""
    return text_config(base_of(model)).vocab_size


def _nats_of(labels_N: Tensor, weights_N: Tensor | None) -> ChunkLoss:
    factors_N = torch.ones(len(labels_N), device=labels_N.device) if weights_N is None else weights_N

    def loss(logits_NV: Tensor, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # A GPU's logits are wider than the product that reads their gradient.
        gradient_NV = logits_NV if logits_NV.dtype == dtype else torch.empty_like(logits_NV, dtype=dtype)
        nll_N = cross_entropy_(logits_NV, labels_N[rows], factors_N[rows], gradient_NV)
        return (nll_N * factors_N[rows]).sum(), gradient_NV

    return loss


class CrossEntropy(nn.Module):
    """The training loss as a module that contains the model.

    forward(batch) returns the weighted sum of negative log-likelihoods over the batch's targets, fp32, in nats; the
    caller divides by the global target count. A batch without a target gives 0 and gradients of 0.
    """

    def __init__(self, model: nn.Module, neftune_alpha: float = 0.0):
        super().__init__()
        self.model = model
        self.neftune_alpha = neftune_alpha

    def forward(self, batch: Batch) -> Tensor:
        targets = target_states(self.model, batch, self.neftune_alpha)
        vocabulary = vocabulary_rows(self.model)
        nats = _nats_of(targets.labels_N, targets.weights_N)
        return chunked_loss(targets.hidden_ND, head_of(self.model), vocabulary, nats)


@torch.no_grad()
def score(model: nn.Module, batch: Batch) -> Score:
    """Return unweighted negative log-likelihood and correct predictions over the targets of a batch."""
    targets = target_states(model, batch)
    hidden_ND, labels_N = targets.hidden_ND, targets.labels_N
    nll = hidden_ND.new_zeros((), dtype=torch.float32)
    correct = hidden_ND.new_zeros((), dtype=torch.float32)
    for logits_NV, rows in chunked_logits(hidden_ND, head_of(model), vocabulary_rows(model)):
        correct += (logits_NV.argmax(-1) == labels_N[rows]).sum()
        nll += cross_entropy_(logits_NV, labels_N[rows]).sum()
    return Score(nll, correct, len(labels_N))
