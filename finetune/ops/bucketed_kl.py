"""Forward KL where the teacher names its most probable tokens alone: all others are one bucket on both sides.

Merging outcomes cannot raise a KL, so it is a lower bound of the exact one, and 0 where the two distributions agree.
Shapes: N rows, V vocabulary rows, K tokens that the teacher names.
Source: Cover and Thomas 2006, section 2.8 (data processing).
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.ops.cross_entropy import softmax_

# A mass that fp32 cannot tell from none, being 1 less what the named tokens have.
_LEAST_MASS = 1e-6


def bucketed_kl_(logits_NV: Tensor, ids_NK: Tensor, log_probs_NK: Tensor, weights_N: Tensor) -> Tensor:
    """Overwrites the logits with factor * d(nats) / d(logits), in their dtype; all arithmetic is fp32.

    ids_NK: int64, each in [0, V), each once in a row. log_probs_NK: fp32, whose probabilities add up to at most 1.
    Returns: nats [N], fp32, without the factors.
    """
    at_ids = torch.arange(len(ids_NK), device=ids_NK.device)[:, None], ids_NK
    logits_NK = logits_NV[at_ids].float()
    probs_NK = log_probs_NK.exp()
    rest_N = (1 - probs_NK.sum(-1)).clamp_min(0)
    highest_N, log_sum_N = softmax_(logits_NV, weights_N)
    log_q_NK = (logits_NK - highest_N[:, None]) - log_sum_N[:, None]
    q_NK = log_q_NK.exp()
    rest_q_N = (1 - q_NK.sum(-1)).clamp_min(_LEAST_MASS)
    # An unnamed token moves with its bucket: q_j * (1 - rest / rest_q).
    logits_NV.mul_((1 - rest_N / rest_q_N)[:, None])
    logits_NV[at_ids] = ((q_NK - probs_NK) * weights_N[:, None]).to(logits_NV.dtype)
    return (probs_NK * (log_probs_NK - log_q_NK)).sum(-1) + torch.special.xlogy(rest_N, rest_N / rest_q_N)
