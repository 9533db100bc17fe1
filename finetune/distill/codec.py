"""A target's distribution in 178 bytes, drawn so that what is learned from it is right on average.

Kept are the `head` most probable tokens with their log-probabilities (16 bit, within 1.9e-4 nats), `samples` tokens
drawn from the others in proportion to their probability, each standing for an equal part of the others' mass, that
mass, and the entropy of the whole. The gradient of forward KL is linear in the teacher's distribution, so its mean over
draws is the exact one. Keeping the head alone and rescaling it is not: it takes the tail's mass for the head.

Shapes: N targets, V vocabulary, K = head + samples tokens kept.
Source: the sampling of Anshumann et al. 2025, arXiv:2503.16870, after the head; strata as in Cochran 1977, ch. 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.losses.chunked import chunked_logits
from finetune.losses.teacher_targets import TeacherHidden, TeacherSamples, TeacherTopK

Columns = dict[str, np.ndarray]

# Log-probabilities in 16-bit steps; what is less probable than exp(-24) is kept as that.
_LOWEST = -24.0
_STEPS = 2**16 - 1
# Ids are 16 bits and two more, four of the latter in a byte.
MOST_IDS = 2**18
# Rows worked on at once, which stay in a processor's cache; on a GPU they bound the temporaries.
_ROWS, _GPU_ROWS = 4, 256
# Consecutive ids that are looked at together: about the square root of 151,665.
_RUN = 384


@torch.no_grad()
def draw(teacher_targets: TeacherHidden, vocabulary: int, head: int, uniforms_NS: np.ndarray) -> Columns:
    """The columns of a cache for each target. uniforms_NS: a number in [0, 1) for each token to draw."""
    head = min(head, vocabulary)
    # One without rows, so that there are columns where there is no target.
    drawn = [_draw_rows(teacher_targets.hidden_ND.new_empty(0, vocabulary), head, torch.from_numpy(uniforms_NS[:0]))]
    for logits_NV, rows in chunked_logits(teacher_targets.hidden_ND, teacher_targets.head, vocabulary):
        uniforms = torch.from_numpy(uniforms_NS[rows]).to(logits_NV.device)
        some = _GPU_ROWS if logits_NV.is_cuda else _ROWS
        drawn += map(_draw_rows, logits_NV.split(some), repeat(head), uniforms.split(some))
    ids_NK, log_probs_NH, tail_N, entropy_N = (torch.cat(parts).cpu().numpy() for parts in zip(*drawn, strict=True))
    return {
        **_encode_ids(ids_NK),
        "log_probs": _encode(log_probs_NH),
        "tail": _encode(tail_N),
        "entropy": entropy_N.astype(np.float32),
    }


def _draw_rows(logits_NV: Tensor, head: int, uniforms_NS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids [N, K], log-probabilities of the head [N, head], logarithm of the others' mass [N], entropy [N]."""
    below_NV = logits_NV.float()
    below_NV = below_NV.sub_(below_NV.amax(-1, keepdim=True))
    parts_NV = below_NV.exp()  # of their sum
    sum_N = parts_NV.sum(-1, dtype=torch.float64)
    entropy_N = sum_N.log() - (parts_NV * below_NV).sum(-1, dtype=torch.float64) / sum_N
    top_NH = _largest(below_NV, head)
    log_probs_NH = below_NV.gather(1, top_NH) - sum_N.log()[:, None]
    drawn_NS, mass_N = _draw_others(parts_NV.scatter_(1, top_NH, 0.0), uniforms_NS)
    return torch.cat([top_NH, drawn_NS], 1), log_probs_NH, (mass_N / sum_N).clamp_min(1e-30).log(), entropy_N


def _largest(values_NV: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest values of each row, largest first.

    They are in the `count` runs of ids whose own largest value is largest, which is quicker to see than all values are
    to sort.
    """
    runs_NRW = _runs(values_NV, -torch.inf)
    if count >= runs_NRW.shape[1]:
        return values_NV.topk(count, dim=-1).indices
    chosen_NC = runs_NRW.amax(-1).topk(count, dim=-1).indices
    inside = runs_NRW.gather(1, chosen_NC[..., None].expand(-1, -1, _RUN)).flatten(1).topk(count, dim=-1).indices
    return chosen_NC.gather(1, inside // _RUN) * _RUN + inside % _RUN


def _draw_others(parts_NV: Tensor, uniforms_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Ids drawn in proportion to these parts, one in each of S equal strata of their sum, and that sum [N] fp64.

    Strata are as unbiased as independent draws, and less spread. First the run of ids is found, then the id in it: no
    cumulative sum over all of them is needed.
    """
    count = uniforms_NS.shape[1]
    runs_NRW = _runs(parts_NV, 0.0)
    sums_NR = runs_NRW.sum(-1, dtype=torch.float64)
    ends_NR = sums_NR.cumsum(-1)
    mass_N = ends_NR[:, -1]
    strata = torch.arange(count, device=uniforms_NS.device, dtype=torch.float64)
    at_NS = (strata + uniforms_NS) / count * mass_N[:, None]
    run_NS = _find(ends_NR, at_NS)
    within_NSW = runs_NRW.gather(1, run_NS[..., None].expand(-1, -1, _RUN)).double().cumsum(-1)
    left_NS = at_NS - (ends_NR - sums_NR).gather(1, run_NS)
    return run_NS * _RUN + _find(within_NSW, left_NS[..., None])[..., 0], mass_N


def _runs(values_NV: Tensor, filling: float) -> Tensor:
    """Runs of consecutive ids [N, R, _RUN]."""
    return F.pad(values_NV, (0, -values_NV.shape[1] % _RUN), value=filling).unflatten(1, (-1, _RUN))


def _find(ends: Tensor, at: Tensor) -> Tensor:
    """Where along the last dimension a cumulative sum first exceeds a value; never an entry that adds nothing, which
    a rounded value beyond the end would find.
    """
    last = torch.searchsorted(ends, ends[..., -1:].contiguous())
    return torch.minimum(torch.searchsorted(ends, at, right=True), last)


def teacher_samples(columns: Mapping[str, np.ndarray], device: torch.device) -> TeacherSamples:
    """What a cache's columns say. Head and tail were rounded each by itself; together they are made to add up to 1."""
    ids_NK = _decode_ids(columns)
    head_NH, tail_N = np.exp(_decode(columns["log_probs"])), np.exp(_decode(columns["tail"]))
    samples = ids_NK.shape[1] - head_NH.shape[1]
    probs_NK = np.concatenate([head_NH, np.repeat(tail_N[:, None] / samples, samples, 1)], 1)
    probs_NK = (probs_NK / probs_NK.sum(1, keepdims=True)).astype(np.float32)
    tensors = (torch.from_numpy(x).to(device) for x in (ids_NK, probs_NK, columns["entropy"]))
    return TeacherSamples(*tensors, top_k=head_NH.shape[1])


def encode_top(ids_NK: np.ndarray, log_probs_NK: np.ndarray) -> Columns:
    """The columns of the most probable tokens alone."""
    return {**_encode_ids(ids_NK), "log_probs": _encode(log_probs_NK)}


def teacher_top_k(columns: Mapping[str, np.ndarray], device: torch.device) -> TeacherTopK:
    """What `encode_top` kept."""
    log_probs_NK = _decode(columns["log_probs"]).astype(np.float32)
    return TeacherTopK(torch.from_numpy(_decode_ids(columns)).to(device), torch.from_numpy(log_probs_NK).to(device))


def _encode(log_probs: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(log_probs / _LOWEST, 0, 1) * _STEPS).astype(np.uint16)


def _decode(codes: np.ndarray) -> np.ndarray:
    return codes.astype(np.float64) * (_LOWEST / _STEPS)


def _encode_ids(ids_NK: np.ndarray) -> Columns:
    high_NK = (ids_NK >> 16).astype(np.uint8)
    high_NK = np.pad(high_NK, ((0, 0), (0, -high_NK.shape[1] % 4)))
    packed = sum(high_NK[:, i::4] << 2 * i for i in range(4))
    return {"low": (ids_NK & 0xFFFF).astype(np.uint16), "high": np.asarray(packed, dtype=np.uint8)}


def _decode_ids(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    low_NK, packed = columns["low"], columns["high"]
    high_NK = np.stack([packed >> 2 * i & 3 for i in range(4)], 2).reshape(len(packed), 4 * packed.shape[1])
    return low_NK.astype(np.int64) | high_NK[:, : low_NK.shape[1]].astype(np.int64) << 16
