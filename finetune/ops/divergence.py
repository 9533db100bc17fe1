"""Divergences of a student from its teacher in closed form, with the gradient of the student's logits.

Nats are those of the distributions at the temperature, without Hinton's factor temperature squared, as in TRL.
Shapes: N rows, V vocabulary rows, K ids of a sparse teacher.
Sources: Agarwal et al. 2024, arXiv:2306.13649 (generalized JSD); Ko et al. 2024, arXiv:2402.03898 (skew KL);
Anshumann et al. 2025, arXiv:2503.16870 (a sampled teacher leaves the gradient of forward KL unbiased); Cover and Thomas
2006, section 2.8 (data processing inequality: merging outcomes cannot increase a KL).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finetune.ops.cross_entropy import rows_per_block, softmax_
from finetune.ops.dispatch import fused
from finetune.ops.limits import SOFTMAX_BLOCK_VALUES

# Below this, 1 - (mass of the K tokens) is rounding error in fp32.
_LEAST_MASS = 1e-6


def divergence_(
    student_NV: Tensor, teacher_NV: Tensor, weights_N: Tensor, kind: str, *, mix: float, temperature: float
) -> Tensor:
    """Return the divergence of each row in nats [N], fp32, unweighted.

    Overwrites the teacher's logits with weight * d(nats) / d(student's logits), in their dtype. Arithmetic is fp32.

    Args:
        student_NV: finite logits, unchanged.
        teacher_NV: finite logits, overwritten.
        weights_N: fp32 weight of each row's gradient.
        kind: a key of DIVERGENCES.
        mix: the teacher's share of the mixture in jsd (beta) and skew_kl (alpha), in (0, 1); unused by other kinds.
        temperature: divides both logits.
    """
    rows = rows_per_block(teacher_NV)
    blocks = zip(student_NV.split(rows), teacher_NV.split(rows), weights_N.split(rows), strict=True)
    return torch.cat([DIVERGENCES[kind](*block, mix, temperature) for block in blocks])


def sampled_kl_(logits_NV: Tensor, ids_NK: Tensor, probs_NK: Tensor, weights_N: Tensor) -> Tensor:
    """Return the cross-entropy against K ids per row in nats [N], fp32, unweighted: -sum of prob * log softmax.

    Overwrites the student's logits with the weighted gradient, in their dtype. Arithmetic is fp32. The gradient is
    M * softmax - probs, where M is the row's sum of probs. It is linear in probs, so unbiased probs give an unbiased
    gradient of forward KL.

    Args:
        logits_NV: the student's logits.
        ids_NK: int64, each in [0, V); probs of repeated ids add up.
        probs_NK: fp32, not negative.
        weights_N: fp32 weight of each row's gradient.
    """
    at_ids = torch.arange(len(ids_NK), device=ids_NK.device)[:, None], ids_NK
    logits_NK = logits_NV[at_ids].float()
    mass_N1 = probs_NK.sum(-1, keepdim=True)
    highest_N, log_sum_N = softmax_(logits_NV, weights_N * mass_N1.squeeze(1))
    log_probs_NK = (logits_NK - highest_N[:, None]) - log_sum_N[:, None]
    # The sum of probs of each id in its row: repeated ids have the same sum.
    rows = max(1, SOFTMAX_BLOCK_VALUES["cpu"] // ids_NK.shape[1] ** 2)
    blocks = zip(ids_NK.split(rows), probs_NK.split(rows), strict=True)
    totals = [((ids[:, :, None] == ids[:, None, :]) * probs[:, None, :]).sum(-1) for ids, probs in blocks]
    # Near the teacher's softmax, the difference of two values rounded to bf16 would be noise.
    difference_NK = mass_N1 * log_probs_NK.exp() - torch.cat(totals)
    logits_NV[at_ids] = (difference_NK * weights_N[:, None]).to(logits_NV.dtype)
    return -(probs_NK * log_probs_NK).sum(-1)


def bucketed_kl_(logits_NV: Tensor, ids_NK: Tensor, log_probs_NK: Tensor, weights_N: Tensor) -> Tensor:
    """Return forward KL in nats [N], fp32, unweighted, where all tokens but the K are one outcome on both sides.

    This is a lower bound of the exact KL, and 0 where both distributions agree. Overwrites the student's logits with
    the weighted gradient, in their dtype. Arithmetic is fp32.

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


@fused
def _forward_kl_rows_(
    student_NV: Tensor, teacher_NV: Tensor, weights_N: Tensor, mix: float, temperature: float
) -> Tensor:
    """KL(p || q)."""
    q_NV, p_NV, log_ratio_NV = _compare(student_NV, teacher_NV, temperature)
    difference_NV = q_NV.sub_(p_NV)
    nats_N = p_NV.mul_(log_ratio_NV).add_(difference_NV).sum(-1)
    teacher_NV.copy_(difference_NV.mul_(weights_N[:, None] / temperature))
    return nats_N


@fused
def _reverse_kl_rows_(
    student_NV: Tensor, teacher_NV: Tensor, weights_N: Tensor, mix: float, temperature: float
) -> Tensor:
    """KL(q || p)."""
    q_NV, p_NV, log_ratio_NV = _compare(student_NV, teacher_NV, temperature)
    rounding_N = p_NV.sub_(q_NV).sum(-1)
    return _through_softmax_(teacher_NV, q_NV, log_ratio_NV.neg_(), weights_N / temperature) + rounding_N


@fused
def _jsd_rows_(student_NV: Tensor, teacher_NV: Tensor, weights_N: Tensor, mix: float, temperature: float) -> Tensor:
    """mix * KL(p || m) + (1 - mix) * KL(q || m) with m = mix * p + (1 - mix) * q."""
    q_NV, p_NV, log_ratio_NV = _compare(student_NV, teacher_NV, temperature)
    smaller_NV = _log_mixture(log_ratio_NV, mix)
    log_mq_NV = log_ratio_NV.clamp(min=0).add_(smaller_NV)
    log_mp_NV = log_ratio_NV.neg_().clamp_(min=0).add_(smaller_NV)
    kl_teacher_N = -p_NV.mul_(log_mp_NV).sum(-1)
    slopes_N = _through_softmax_(teacher_NV, q_NV, log_mq_NV.mul_(mix - 1), weights_N / temperature)
    return mix * kl_teacher_N + slopes_N


@fused
def _skew_kl_rows_(student_NV: Tensor, teacher_NV: Tensor, weights_N: Tensor, mix: float, temperature: float) -> Tensor:
    """KL(p || m) with m = mix * p + (1 - mix) * q."""
    q_NV, p_NV, log_ratio_NV = _compare(student_NV, teacher_NV, temperature)
    # m / p - 1. From exp(80) on, p adds nothing to either sum, and exp(89) would overflow.
    excess_NV = log_ratio_NV.neg_().clamp_(max=80).expm1_().mul_(1 - mix)
    rounding_N = (q_NV - p_NV).sum(-1) * (1 - mix)
    nats_N = rounding_N - p_NV.mul_(excess_NV.log1p()).sum(-1)
    # The slope -(1 - mix) * p / m plus a constant, which drops out: 0 where both agree.
    slopes_NV = excess_NV.div_(excess_NV + 1).mul_(1 - mix)
    _through_softmax_(teacher_NV, q_NV, slopes_NV, weights_N / temperature)
    return nats_N


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor, float, float], Tensor]] = {
    "forward_kl": _forward_kl_rows_,
    "reverse_kl": _reverse_kl_rows_,
    "jsd": _jsd_rows_,
    "skew_kl": _skew_kl_rows_,
}


def _compare(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, p and log(p / q), fp32. The last uses differences of logits: two logarithms would each be rounded.

    The differences q - p sum to the rounding error of both normalizations; adding them to a KL removes that error.
    """
    below_q_NV, q_NV, sum_q_N1 = _softmax(student_NV, temperature)
    below_p_NV, p_NV, sum_p_N1 = _softmax(teacher_NV, temperature)
    return q_NV, p_NV, below_p_NV.sub_(below_q_NV).div_(temperature).sub_((sum_p_N1 / sum_q_N1).log())


def _softmax(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits minus their row's maximum, their softmax, and the sum of exponentials [N, 1]; fp32."""
    below_NV = logits_NV - logits_NV.amax(-1, keepdim=True).float()
    exponentials_NV = (below_NV / temperature).exp_()
    sum_N1 = exponentials_NV.sum(-1, keepdim=True)
    return below_NV, exponentials_NV.div_(sum_N1), sum_N1


def _log_mixture(log_ratio_NV: Tensor, mix: float) -> Tensor:
    """Return log(m / p) where p is larger, else log(m / q): the one that is not above 0.

    Neither overflows. Both are exact near p = q. Their rounding error is 6e-8 / (distance of mix from 0 or 1).
    """
    shares_NV = log_ratio_NV.sign().mul_(0.5 - mix).add_(0.5)  # torch.where takes ten times as long
    return log_ratio_NV.abs().neg_().expm1_().mul_(shares_NV).log1p_()


def _through_softmax_(place_NV: Tensor, q_NV: Tensor, slopes_NV: Tensor, weights_N: Tensor) -> Tensor:
    """Write the weighted gradient of the logits, given the slopes with respect to q; return their means under q [N]."""
    means_N = (q_NV * slopes_NV).sum(-1)
    place_NV.copy_(slopes_NV.sub_(means_N[:, None]).mul_(q_NV).mul_(weights_N[:, None]))
    return means_N
