"""Cross-entropy in closed form: the gradient of the logits, softmax minus one at the label, overwrites them.

Shapes: N rows, V vocabulary rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.ops.dispatch import fused
from finetune.ops.limits import SOFTMAX_BLOCK_VALUES
from finetune.system.accelerator import on_gpu, table_key


def cross_entropy_(
    logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None = None, gradient_NV: Tensor | None = None
) -> Tensor:
    """Return negative log-likelihoods [N] in nats, fp32, unweighted.

    Overwrites the logits. The gradient, d(sum of weight * nats) / d(logits), is in them, or in `gradient_NV` if given,
    in its dtype. Arithmetic is fp32.

    labels_N: int64, each in [0, V). weights_N: fp32 weight of each row's gradient; None is 1 everywhere.
    """
    weights_N = torch.ones(len(labels_N), device=logits_NV.device) if weights_N is None else weights_N
    apart = gradient_NV is not None and gradient_NV is not logits_NV
    if apart and on_gpu(logits_NV):
        return _cross_entropy_rows_(logits_NV, labels_N, weights_N, gradient_NV)
    at_label = torch.arange(len(labels_N), device=logits_NV.device), labels_N
    label_logits_N = logits_NV[at_label].float()
    highest_N, log_sum_N = softmax_(logits_NV, weights_N)
    log_probs_N = (label_logits_N - highest_N) - log_sum_N
    # expm1, because a softmax near 1 rounded to bf16, minus 1, is noise. Not scatter_: it copies the matrix on a CPU.
    logits_NV[at_label] = (torch.expm1(log_probs_N) * weights_N).to(logits_NV.dtype)
    if apart:
        gradient_NV.copy_(logits_NV)
    return -log_probs_N


@fused
def _cross_entropy_rows_(logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor, gradient_NV: Tensor) -> Tensor:
    """Do so in one kernel of a GPU. gradient_NV: not the logits, since each column is compared with the label.

    In place, Inductor would read the label's logit from a copy of the matrix.
    """
    label_logits_N1 = logits_NV.gather(1, labels_N[:, None]).float()
    highest_N1 = logits_NV.amax(-1, keepdim=True).float()
    exponentials_NV = (logits_NV - highest_N1).exp_()
    sum_N1 = exponentials_NV.sum(-1, keepdim=True)
    log_probs_N1 = (label_logits_N1 - highest_N1) - sum_N1.log()
    is_label_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == labels_N[:, None]
    at_label_N1 = torch.expm1(log_probs_N1) * weights_N[:, None]
    gradient_NV.copy_(torch.where(is_label_NV, at_label_N1, exponentials_NV.mul_(weights_N[:, None] / sum_N1)))
    return -log_probs_N1.squeeze(1)


def softmax_(logits_NV: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite the logits with weight * softmax, in their dtype; arithmetic is fp32.

    Returns:
        The maximum logit of each row [N], and log of the sum of exp(logit - maximum) [N], fp32.
    """
    if on_gpu(logits_NV):  # a compiled kernel has no temporaries, and plain torch runs in blocks of its own
        return _softmax_rows_(logits_NV, weights_N)
    rows = rows_per_block(logits_NV)
    blocks = zip(logits_NV.split(rows), weights_N.split(rows), strict=True)
    highest, log_sum = zip(*(_softmax_rows_(*block) for block in blocks), strict=True)
    return torch.cat(highest), torch.cat(log_sum)


def rows_per_block(logits_NV: Tensor) -> int:
    """Return how many rows of logits one block holds, at least 1."""
    values = SOFTMAX_BLOCK_VALUES[table_key(logits_NV)] * (1 if on_gpu(logits_NV) else torch.get_num_threads())
    return max(1, values // logits_NV.shape[1])


@fused
def _softmax_rows_(logits_NV: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    highest_N1 = logits_NV.amax(-1, keepdim=True).float()
    exponentials_NV = (logits_NV - highest_N1).exp_()
    sum_N1 = exponentials_NV.sum(-1, keepdim=True)
    logits_NV.copy_(exponentials_NV.mul_(weights_N[:, None] / sum_N1))
    return highest_N1.squeeze(1), sum_N1.log().squeeze(1)
