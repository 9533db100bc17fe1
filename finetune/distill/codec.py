"""A target's distribution in 178 bytes, drawn so that what is learnt from it is right on average.

Kept are the `head` most probable tokens with their log-probabilities (16 bit, within 1.9e-4 nats), `samples` tokens
drawn from the others in proportion to their probability, each standing for an equal part of the others' mass, that
mass, and the entropy of the whole. The gradient of forward KL is linear in the teacher's distribution, so its mean over
draws is the exact one. Keeping the head alone and rescaling it is not: it takes the tail's mass for the head.

Shapes: N targets, V vocabulary, K = head + samples tokens kept.
Source: the sampling of Anshumann et al. 2025, arXiv:2503.16870, after the head; strata as in Cochran 1977, ch. 5.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from finetune.losses.chunked import chunked_logits
from finetune.losses.signal import HiddenSignal, SampledSignal, TopSignal

Columns = dict[str, np.ndarray]

# Log-probabilities in 16-bit steps; what is less probable than exp(-24) is kept as that.
_LOWEST = -24.0
_STEPS = 2**16 - 1
# Ids are 16 bits and two more, four of the latter in a byte.
MOST_IDS = 2**18
# Rows whose cumulative sums are alive at once, in fp64: 10 MB at 151,665 tokens.
_ROWS = 8


@torch.no_grad()
def draw(signal: HiddenSignal, vocabulary: int, head: int, uniforms_NS: np.ndarray) -> Columns:
    """The columns of a cache for each target. uniforms_NS: a number in [0, 1) for each token to draw."""
    head = min(head, vocabulary)
    none = _draw_rows(signal.hidden_ND.new_empty(0, vocabulary), head, torch.from_numpy(uniforms_NS[:0]))
    parts = [none]  # so that there are columns where there is no target
    for logits_NV, rows in chunked_logits(signal.hidden_ND, signal.head, vocabulary):
        uniforms = torch.from_numpy(uniforms_NS[rows]).to(logits_NV.device)
        parts += [
            _draw_rows(logits_NV[some], head, uniforms[some])
            for some in (slice(i, i + _ROWS) for i in range(0, len(logits_NV), _ROWS))
        ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _draw_rows(logits_NV: Tensor, head: int, uniforms_NS: Tensor) -> Columns:
    log_probs_NV = torch.log_softmax(logits_NV.float(), -1)
    top = log_probs_NV.topk(head, dim=-1)
    probs_NV = log_probs_NV.exp().double()
    entropy_N = -(probs_NV * log_probs_NV).sum(-1)
    sums_NV = probs_NV.scatter_(1, top.indices, 0.0).cumsum_(-1)
    mass_N = sums_NV[:, -1].clone()
    # One draw in each of S equal strata: as unbiased as independent draws, and less spread.
    count = uniforms_NS.shape[1]
    strata = torch.arange(count, device=uniforms_NS.device, dtype=torch.float64)
    at_NS = (strata + uniforms_NS) / count * mass_N[:, None]
    drawn_NS = torch.searchsorted(sums_NV, at_NS, right=True).clamp_(max=logits_NV.shape[1] - 1)
    ids_NK = torch.cat([top.indices, drawn_NS], 1).cpu().numpy()
    return {
        **_encode_ids(ids_NK),
        "log_probs": _encode(top.values.cpu().numpy()),
        "tail": _encode(mass_N.clamp_min(1e-30).log().cpu().numpy()),
        "entropy": entropy_N.float().cpu().numpy(),
    }


def sampled_signal(columns: Mapping[str, np.ndarray], device: torch.device) -> SampledSignal:
    """What a cache's columns say. Head and tail were rounded each by itself; together they are made to add up to 1."""
    ids_NK = _decode_ids(columns)
    head_NH, tail_N = np.exp(_decode(columns["log_probs"])), np.exp(_decode(columns["tail"]))
    samples = ids_NK.shape[1] - head_NH.shape[1]
    probs_NK = np.concatenate([head_NH, np.repeat(tail_N[:, None] / samples, samples, 1)], 1)
    probs_NK = (probs_NK / probs_NK.sum(1, keepdims=True)).astype(np.float32)
    tensors = (torch.from_numpy(x).to(device) for x in (ids_NK, probs_NK, columns["entropy"]))
    return SampledSignal(*tensors, head=head_NH.shape[1])


def encode_top(ids_NK: np.ndarray, log_probs_NK: np.ndarray) -> Columns:
    """The columns of the most probable tokens alone."""
    return {**_encode_ids(ids_NK), "log_probs": _encode(log_probs_NK)}


def top_signal(columns: Mapping[str, np.ndarray], device: torch.device) -> TopSignal:
    """What `encode_top` kept."""
    log_probs_NK = _decode(columns["log_probs"]).astype(np.float32)
    return TopSignal(torch.from_numpy(_decode_ids(columns)).to(device), torch.from_numpy(log_probs_NK).to(device))


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
