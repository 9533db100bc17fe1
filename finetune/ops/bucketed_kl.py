"""Forward KL for a teacher that returns its most probable tokens only: all others are one outcome on both sides.

Merging outcomes cannot increase a KL: this is a lower bound of the exact KL, and 0 where both distributions agree.
Shapes: N rows, V vocabulary rows, K tokens from the teacher.
Source: Cover and Thomas 2006, section 2.8 (data processing inequality).
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.ops.cross_entropy import softmax_

# Below this, 1 - (mass of the K tokens) is rounding error in fp32.
_LEAST_MASS = 1e-6


def bucketed_kl_(logits_NV: Tensor, ids_NK: Tensor, log_probs_NK: Tensor, weights_N: Tensor) -> Tensor:
    """Return the KL in nats [N], fp32, unweighted.

    Overwrites the logits with weight * d(nats) / d(logits), in their dtype. Arithmetic is fp32.

    Args:
        logits_NV: the student's logits.
        ids_NK: int64, each in [0, V), without repetition in a row.
        log_probs_NK: fp32; the probabilities sum to at most 1.
        weights_N: fp32 weight of each row's gradient.
    """
    at_ids = torch.arange(len(ids_NK), device=ids_NK.device)[:, None], ids_NK
    logits_NK = logits_NV[at_ids].float()
    probs_NK = log_probs_NK.exp()
    rest_N = (1 - probs_NK.sum(-1)).clamp_min(0)
    highest_N, log_sum_N = softmax_(logits_NV, weights_N)
    log_q_NK = (logits_NK - highest_N[:, None]) - log_sum_N[:, None]
    q_NK = log_q_NK.exp()
    rest_q_N = (1 - q_NK.sum(-1)).clamp_min(_LEAST_MASS)
    # Gradient of a token outside the K: q_j * (1 - rest / rest_q).
    logits_NV.mul_((1 - rest_N / rest_q_N)[:, None])
    logits_NV[at_ids] = ((q_NK - probs_NK) * weights_N[:, None]).to(logits_NV.dtype)
    return (probs_NK * (log_probs_NK - log_q_NK)).sum(-1) + torch.special.xlogy(rest_N, rest_N / rest_q_N)
