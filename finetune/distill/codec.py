"""Store a target's distribution in 178 bytes, so that gradients are right on average.

Stored are:

- the `top_k` most probable tokens with their log-probabilities (16 bit, within 1.9e-4 nats)
- `num_samples` other tokens, drawn in proportion to their probability; each has an equal share of the tail's mass
- the mass of the tail, and the entropy of the whole distribution

The gradient of forward KL is linear in the teacher's distribution, so its mean over draws is exact. A rescaled top-k
alone is biased: it moves the tail's mass to the top.

Shapes: N targets, V vocabulary, K = top_k + num_samples tokens stored.
Source: Anshumann et al. 2025, arXiv:2503.16870 (sampling); Cochran 1977, ch. 5 (strata).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.losses.chunked import chunked_logits
from finetune.losses.distillation import TeacherHidden, TeacherSamples, TeacherTopK
from finetune.ops.determinism import cumulative_sums
from finetune.system.accelerator import on_gpu

Columns = dict[str, np.ndarray]
# By kind of a cache of samples: the dtype (of safetensors) and the number of dimensions of each column.
LAYOUTS: dict[str, dict[str, tuple[str, int]]] = {}
LAYOUTS["top"] = {"low": ("U16", 2), "high": ("U8", 2), "log_probs": ("U16", 2)}
LAYOUTS["sampled"] = LAYOUTS["top"] | {"tail": ("U16", 1), "entropy": ("F32", 1)}

# Log-probabilities in 16-bit steps. Tokens below exp(-24) are stored as exp(-24).
_LOWEST = -24.0
_STEPS = 2**16 - 1
# An id has 16 low bits and two high bits; one byte holds the high bits of four ids.
MOST_IDS = 2**18
# Rows processed at once: they fit a CPU's cache, and bound the temporaries on a GPU.
_ROWS, _GPU_ROWS = 4, 256
# Consecutive ids searched together: about the square root of 151,665.
_RUN = 384


@torch.no_grad()
def draw(teacher_targets: TeacherHidden, vocabulary: int, head: int, uniforms_NS: np.ndarray) -> Columns:
    """Return the columns of a cache. uniforms_NS: a number in [0, 1) for each token to draw."""
    head = min(head, vocabulary)
    # Start with zero rows, so that columns exist without targets.
    drawn = [_draw_rows(teacher_targets.hidden_ND.new_empty(0, vocabulary), head, torch.from_numpy(uniforms_NS[:0]))]
    for logits_NV, rows in chunked_logits(teacher_targets.hidden_ND, teacher_targets.head, vocabulary):
        uniforms = torch.from_numpy(uniforms_NS[rows]).to(logits_NV.device)
        rows_at_once = _GPU_ROWS if on_gpu(logits_NV) else _ROWS
        drawn += map(_draw_rows, logits_NV.split(rows_at_once), repeat(head), uniforms.split(rows_at_once))
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
    """Return the ids of the `count` largest values of each row, largest first.

    They lie in the `count` runs with the largest maxima. Finding these runs is faster than sorting all values.
    """
    runs_NRW = _runs(values_NV, -torch.inf)
    if count >= runs_NRW.shape[1]:
        return values_NV.topk(count, dim=-1).indices
    chosen_NC = runs_NRW.amax(-1).topk(count, dim=-1).indices
    inside = runs_NRW.gather(1, chosen_NC[..., None].expand(-1, -1, _RUN)).flatten(1).topk(count, dim=-1).indices
    return chosen_NC.gather(1, inside // _RUN) * _RUN + inside % _RUN


def _draw_others(parts_NV: Tensor, uniforms_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Draw ids in proportion to these parts, one per stratum of their sum [N], and return both.

    Strata are as unbiased as independent draws and have less variance. The search goes by run, then by id in the run,
    so it needs no cumulative sum over all ids.
    """
    count = uniforms_NS.shape[1]
    runs_NRW = _runs(parts_NV, 0.0)
    sums_NR = runs_NRW.sum(-1, dtype=torch.float64)
    ends_NR = cumulative_sums(sums_NR)
    mass_N = ends_NR[:, -1]
    strata = torch.arange(count, device=uniforms_NS.device, dtype=torch.float64)
    at_NS = (strata + uniforms_NS) / count * mass_N[:, None]
    run_NS = _find(ends_NR, at_NS)
    within_NSW = cumulative_sums(runs_NRW.gather(1, run_NS[..., None].expand(-1, -1, _RUN)).double())
    left_NS = at_NS - (ends_NR - sums_NR).gather(1, run_NS)
    return run_NS * _RUN + _find(within_NSW, left_NS[..., None])[..., 0], mass_N


def _runs(values_NV: Tensor, filling: float) -> Tensor:
    """Split into runs of consecutive ids: [N, R, _RUN]."""
    return F.pad(values_NV, (0, -values_NV.shape[1] % _RUN), value=filling).unflatten(1, (-1, _RUN))


def _find(ends: Tensor, at: Tensor) -> Tensor:
    """Return where a cumulative sum first exceeds a value, along the last dimension.

    The result is never an entry that adds nothing, which a value rounded beyond the end would find.
    """
    last = torch.searchsorted(ends, ends[..., -1:].contiguous())
    return torch.minimum(torch.searchsorted(ends, at, right=True), last)


def teacher_samples(columns: Mapping[str, np.ndarray], device: torch.device) -> TeacherSamples:
    """Decode the columns of `draw`. Head and tail are rounded separately, so their sum is normalized to 1."""
    ids_NK = _decode_ids(columns)
    head_NH, tail_N = np.exp(_decode(columns["log_probs"])), np.exp(_decode(columns["tail"]))
    samples = ids_NK.shape[1] - head_NH.shape[1]
    probs_NK = np.concatenate([head_NH, np.repeat(tail_N[:, None] / samples, samples, 1)], 1)
    probs_NK = (probs_NK / probs_NK.sum(1, keepdims=True)).astype(np.float32)
    tensors = (torch.from_numpy(x).to(device) for x in (ids_NK, probs_NK, columns["entropy"]))
    return TeacherSamples(*tensors, top_k=head_NH.shape[1])


def encode_top(ids_NK: np.ndarray, log_probs_NK: np.ndarray) -> Columns:
    """Return the columns of the most probable tokens alone."""
    return {**_encode_ids(ids_NK), "log_probs": _encode(log_probs_NK)}


def teacher_top_k(columns: Mapping[str, np.ndarray], device: torch.device) -> TeacherTopK:
    """Decode the columns of `encode_top`."""
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
