"""Largest logits and drawn tokens of many rows at once, without sorting the vocabulary.

Shapes: N rows, R sampled rows, V vocabulary, K largest of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finetune.evaluation.generation import draw_by_weights

# Logits of a block. The largest logits are in the blocks with the largest maxima.
_BLOCK = 64
# Tokens among which top_p is looked for first; few distributions need more.
_CANDIDATES = 128
# Tokens that may be as probable as the last one of top_k.
_TIES = 64
# A lower temperature chooses the most probable token as well, but 0 / 0 is no number.
_LEAST_TEMPERATURE = 1e-30


class Draw(NamedTuple):
    """How a row's token is drawn. share: in [0, 1). top_k: 0 or less for all tokens."""

    share: float
    temperature: float
    top_k: int
    top_p: float


def draw_ids(logits_RV: Tensor, draws: list[Draw]) -> Tensor:
    """Return the id [R] of each row at which the cumulative probabilities, in the order of ids, pass the row's share.

    Temperature, top_k and top_p apply in this order. Tokens as probable as the least probable one kept are kept too.

    Args:
        logits_RV: fp32; overwritten. Minus infinity: never drawn. Others that are not finite: any id may come.
    """
    settings_RX = torch.tensor(draws, dtype=torch.float64, device=logits_RV.device)
    settings_RX[:, 1].clamp_(min=_LEAST_TEMPERATURE)
    ids_R = torch.empty(len(draws), dtype=torch.long, device=logits_RV.device)
    few = [r for r, draw in enumerate(draws) if 0 < draw.top_k < logits_RV.shape[1]]
    others = sorted(set(range(len(draws))) - set(few))
    if few:
        logits, settings = rows_of(logits_RV, few), settings_RX[few]
        ids_R[few], least, ties = _draw_from_top_k(logits, settings, max(draws[r].top_k for r in few))
        if tied := torch.nonzero(ties).flatten().tolist():  # waits for the GPU
            rows = [few[f] for f in tied]
            logits_RV[rows] = logits_RV[rows].masked_fill_(logits_RV[rows] < least[tied], -torch.inf)
            others = sorted(others + rows)
    if others:
        cut = any(draws[r].top_p < 1 for r in others)
        ids_R[others] = _draw_from_all(rows_of(logits_RV, others), settings_RX[others], cut)
    return ids_R


def _draw_from_top_k(logits_RV: Tensor, settings_RX: Tensor, largest_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw from the largest logits alone.

    Returns: ids [R], the k-th largest logit [R, 1], and whether more tokens have it than were looked at [R].
    """
    draw_R, temperature_R1, top_k_R1, top_p_R1 = _columns(settings_RX)
    count = min(largest_k + _TIES, logits_RV.shape[1])
    largest_RK, places_RK = largest(logits_RV, count)
    least_R1 = largest_RK.gather(1, top_k_R1.long() - 1)
    weights_RK = _weights(largest_RK.clone(), largest_RK[:, :1], temperature_R1).where(largest_RK >= least_R1, 0)
    least_weight_R1, _ = _nucleus(weights_RK, weights_RK.sum(1, keepdim=True) * top_p_R1)
    weights_RK = weights_RK.where((weights_RK >= least_weight_R1) | (top_p_R1 >= 1), 0)
    places_RK, order_RK = places_RK.sort(1)
    drawn_R, _ = draw_by_weights(weights_RK.gather(1, order_RK), draw_R)
    ties_R = (largest_RK[:, -1:] == least_R1).squeeze(1) & (count < logits_RV.shape[1])
    return places_RK.gather(1, drawn_R[:, None]).squeeze(1), least_R1, ties_R


def _draw_from_all(logits_RV: Tensor, settings_RX: Tensor, cut: bool) -> Tensor:
    """Draw ids [R] from all tokens. cut: whether a row has a top_p."""
    draw_R, temperature_R1, _, top_p_R1 = _columns(settings_RX)
    weights_RV = _weights(logits_RV, _block_maxima(logits_RV).amax(1, keepdim=True), temperature_R1)
    if cut:
        limits_R1 = weights_RV.sum(1, keepdim=True) * top_p_R1
        largest_RK, _ = largest(weights_RV, min(_CANDIDATES, weights_RV.shape[1]))
        least_R1, more_R = _nucleus(largest_RK, limits_R1)
        more_R &= top_p_R1.squeeze(1) < 1
        if more_R.any():  # waits for the GPU
            parts = (each.split(_rows_at_once(weights_RV)) for each in (weights_RV[more_R], limits_R1[more_R]))
            least_R1[more_R] = torch.cat([_least_of_share(*part) for part in zip(*parts, strict=True)])
        weights_RV.mul_(_reaches(weights_RV, least_R1.where(top_p_R1 < 1, 0)))
    return draw_by_weights(weights_RV, draw_R)[0]


def _columns(settings_RX: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return shares [R], and temperatures, top_k and top_p [R, 1]."""
    return settings_RX[:, 0], settings_RX[:, 1:2].float(), settings_RX[:, 2:3], settings_RX[:, 3:4]


def _weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Return probabilities times a factor, in the place of the logits."""
    return logits.sub_(best).div_(temperature).exp_()


def _nucleus(largest_RK: Tensor, limits_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least of the largest weights that add up to a limit [R, 1], and whether they need more of them [R]."""
    before_RK = largest_RK.double().cumsum(1) - largest_RK
    kept_RK = before_RK < limits_R1
    last_R1 = kept_RK.sum(1, keepdim=True).sub_(1).clamp_(min=0)
    return largest_RK.gather(1, last_R1), kept_RK[:, -1]


def _least_of_share(weights_RV: Tensor, limits_R1: Tensor) -> Tensor:
    """Return the largest number [R, 1] such that the weights from it on add up to a limit.

    Bisection over the bits of the number, which are in the order of numbers: 5 times as fast as sorting.
    """
    low_R1 = torch.zeros_like(limits_R1, dtype=torch.int32)
    high_R1 = weights_RV.amax(1, keepdim=True).view(torch.int32) + 1
    for _ in range(31):
        middle_R1 = low_R1 + (high_R1 - low_R1) // 2
        sums_R1 = _reaches(weights_RV, middle_R1.view(torch.float32)).mul_(weights_RV).sum(1, keepdim=True)
        enough_R1 = sums_R1 >= limits_R1
        low_R1, high_R1 = middle_R1.where(enough_R1, low_R1), high_R1.where(enough_R1, middle_R1)
    return low_R1.view(torch.float32)


def _rows_at_once(weights: Tensor) -> int:
    """Return how many rows to read again and again: on a CPU one, which fits in the cache of a core."""
    return 1 if weights.device.type == "cpu" else len(weights)


def _reaches(weights: Tensor, least: Tensor) -> Tensor:
    """Return 1 where a weight is at least the least one, else 0. As fp32: a CPU is slow with conditions."""
    return torch.ge(weights, least, out=torch.empty_like(weights))


def most_probable(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit of each row [N] and its id, the lowest of equal ones.

    One NaN makes a row's largest logit NaN. The maxima of blocks take a third of the time of `argmax`.
    """
    inside, places = _inside(logits_NV, _block_maxima(logits_NV).argmax(1, keepdim=True))
    found_N1 = inside.argmax(1, keepdim=True)
    return inside.gather(1, found_N1).squeeze(1), places.gather(1, found_N1).squeeze(1)


def largest(values_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest values of each row [N, count], in order, and their places [N, count]."""
    maxima = _block_maxima(values_NV)
    if 4 * count > maxima.shape[1]:
        return values_NV.topk(count, dim=1)
    inside, places = _inside(values_NV, maxima.topk(count, dim=1).indices)
    found, order = inside.topk(count, dim=1)
    return found, places.gather(1, order)


def _block_maxima(values_NV: Tensor) -> Tensor:
    """Return the maximum of each block of values; the last block may be short."""
    blocks, rest = divmod(values_NV.shape[1], _BLOCK)
    maxima = values_NV[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK)).amax(2)
    return torch.cat([maxima, values_NV[:, -rest:].amax(1, keepdim=True)], 1) if rest else maxima


def _inside(values_NV: Tensor, blocks_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values in some blocks, minus infinity beyond the last value, and their places: [N, K * block]."""
    places = (blocks_NK[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=values_NV.device)).flatten(1)
    last = values_NV.shape[1] - 1
    return values_NV.gather(1, places.clamp(max=last)).masked_fill_(places > last, -torch.inf), places


def rows_of(values: Tensor, rows: list[int]) -> Tensor:
    """Return some rows, in order; the tensor itself if they are all of its rows."""
    return values if len(rows) == len(values) else values.index_select(0, torch.tensor(rows, device=values.device))
