"""Causal attention over packed segments without a mask.

A packed row of T tokens holds S documents. A dense block mask costs T * T whatever the documents' lengths. A GPU has a
kernel for documents of any length. Elsewhere documents of about one length are laid out as a batch, padded on the
right: under causal attention no token sees what comes after it, so the padding needs no mask, and the kernel keeps its
causal skip and native grouped heads. Lengths are rounded up to few distinct ones, because CPU kernels are compiled
anew for each shape.

The layout may take a row several times: documents that open with the same tokens share the rows of their common part,
whose hidden states are the same, so that all else in the model computes them once.

Shapes: B batch (1 when packed), H heads, T tokens, R rows computed, P places of the layout, L length, D head width.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune.ops import cpu_attention
from finetune.ops.limits import DOCUMENT_TOKENS_MULTIPLE, FUSED_ATTENTION_FROM_TOKENS, ROWS_MULTIPLE
from finetune.ops.matmul import uses_fp32_matmul

SEGMENTED = "segmented"


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the rows of a packed forward pass lie in a layout of whole documents.

    rows: R, of which the first U hold tokens and the rest is padding. source [P]: the row that fills each of P places
    (any, for the layout's padding); place [U]: the first place of each row. identical: the rows are the layout already.
    shared: some row fills several places. groups: (documents, rounded length) of each group of the padded
    layout. On a GPU with a kernel for documents of any length the layout has no padding: cumulative [S + 1] int32
    borders of S documents, longest: tokens of the longest.
    """

    rows: int
    source: Tensor
    place: Tensor
    identical: bool = False
    shared: bool = False
    groups: tuple[tuple[int, int], ...] = ()
    cumulative: Tensor | None = None
    longest: int = 0


def plan_segments(
    lengths: Sequence[int], row_of_token: Tensor, rows: int, device: torch.device, dtype: torch.dtype
) -> Segments:
    """The layout of documents of these lengths, in tokens, T in all.

    row_of_token [T], on the CPU: the row that holds each token, of U rows in use; documents that open alike may share
    rows. rows: R, how many there are with padding.
    """
    used = int(row_of_token.max()) + 1
    shared = len(row_of_token) > used
    if varlen_kernel(device, dtype) is not None:
        borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)
        place = _first_places(row_of_token, used).to(device)
        identical = rows == used == len(row_of_token)
        return Segments(rows, row_of_token.to(device), place, identical, shared, (), borders, max(lengths))
    grouped: dict[int, list[Tensor]] = {}
    for document in row_of_token.split(list(lengths)):
        rounded = round_up(len(document), DOCUMENT_TOKENS_MULTIPLE)
        # Padding repeats a document's last row, so a row's first place is a real one.
        grouped.setdefault(rounded, []).append(document[torch.arange(rounded).clamp_(max=len(document) - 1)])
    source = torch.cat([document for group in grouped.values() for document in group])
    groups = tuple((len(group), rounded) for rounded, group in grouped.items())
    return Segments(rows, source.to(device), _first_places(source, used).to(device), False, shared, groups)


def round_up(length: int, multiple: int = ROWS_MULTIPLE) -> int:
    """The length that so many rows are padded to: few distinct ones, since CPU kernels are compiled for each."""
    return -(-length // multiple) * multiple


def _first_places(source: Tensor, rows: int) -> Tensor:
    places = torch.arange(len(source))
    return torch.full((rows,), len(source)).scatter_reduce_(0, source, places, "amin")


@functools.cache
def varlen_kernel(device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """torch's attention over documents of any length, where the device, the type and this torch have it."""
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not half or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    from torch.nn.attention.varlen import varlen_attn

    # Before grouped heads and a scale could be asked for, it could not serve Qwen2.
    asked_for = {"enable_gqa", "scale", "window_size"}
    return varlen_attn if asked_for <= inspect.signature(varlen_attn).parameters.keys() else None


class _Scatter(torch.autograd.Function):
    """Rows to places; `summed` where a row's gradient is the sum over its places, not that at its first place alone."""

    @staticmethod
    def forward(ctx, x: Tensor, segments: Segments, summed: bool) -> Tensor:
        ctx.segments, ctx.summed = segments, summed
        return x.index_select(0, segments.source)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (grad,), segments = grad_outputs, ctx.segments
        if ctx.summed:
            # Accumulated in a fixed order on a GPU too, unlike index_add_.
            total = torch.zeros(segments.rows, *grad.shape[1:], dtype=torch.float32, device=grad.device)
            return total.index_put_((segments.source,), grad.float(), accumulate=True).to(grad.dtype), None, None
        return _padded(grad.index_select(0, segments.place), segments.rows), None, None


class _Gather(torch.autograd.Function):
    """Places to rows; zero for rows that no token names."""

    @staticmethod
    def forward(ctx, x: Tensor, segments: Segments) -> Tensor:
        ctx.segments, ctx.places = segments, len(x)
        return _padded(x.index_select(0, segments.place), segments.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        place = ctx.segments.place
        grad = grad_outputs[0][: len(place)]
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, place, grad), None


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else F.pad(x, (0, 0, 0, 0, 0, rows - len(x)))


def attend(query_RHD: Tensor, key_RHD: Tensor, value_RHD: Tensor, segments: Segments, scale: float) -> Tensor:
    """Causal attention within each document, [R, H, D], without dropout.

    Raises: ValueError if the segments don't cover the R rows given.
    """
    if segments.rows != len(query_RHD):
        raise ValueError(f"the segments cover {segments.rows} rows, not the {len(query_RHD)} given")
    q, k, v = query_RHD, key_RHD, value_RHD
    if not segments.identical:
        q = _Scatter.apply(q, segments, False)
        k, v = _Scatter.apply(k, segments, segments.shared), _Scatter.apply(v, segments, segments.shared)
    if segments.cumulative is not None:
        kernel, borders, longest = varlen_kernel(q.device, q.dtype), segments.cumulative, segments.longest
        assert kernel is not None  # the plan was made for this device and type
        output = kernel(q, k, v, borders, borders, longest, longest, window_size=(-1, 0), scale=scale, enable_gqa=True)
    else:
        sizes = [documents * length for documents, length in segments.groups]
        parts = zip(segments.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        outputs = []
        for group, *qkv in parts:
            q, k, v = (part.unflatten(0, group).transpose(1, 2) for part in qkv)
            outputs.append(_causal_attention(q, k, v, scale).flatten(0, 1))
        output = torch.cat(outputs)
    return output if segments.identical else _Gather.apply(output, segments)


def _causal_attention(query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, scale: float) -> Tensor:
    """[B, L, H, D] of a batch of documents of one length, by the kernel that is fast at that length."""
    short = query_BHLD.device.type == "cpu" and query_BHLD.shape[2] < FUSED_ATTENTION_FROM_TOKENS
    if short or uses_fp32_matmul(query_BHLD.device, query_BHLD.dtype):
        return cpu_attention.causal_attention(query_BHLD, key_BHLD, value_BHLD, scale).transpose(1, 2)
    grouped, fused = query_BHLD.shape[1] != key_BHLD.shape[1], F.scaled_dot_product_attention
    return fused(query_BHLD, key_BHLD, value_BHLD, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)


def segmented_attention(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention that never looks across a segment's border; plain SDPA when no segments are given.

    segments: the caller passes them as a keyword of the model's forward.
    Returns: [B, T, H, D] and None (no attention weights), as transformers expects of an attention function.
    Raises: ValueError if the segments don't cover the T tokens, or a mask or dropout is asked for beside them.
    """
    if segments is None:
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)
    if attention_mask is not None or kwargs.get("dropout"):
        raise ValueError("segmented attention over packed documents takes no mask and no attention dropout")
    query, key, value = (x[0].transpose(0, 1) for x in (query_BHTD, key_BHTD, value_BHTD))
    return attend(query, key, value, segments, kwargs["scaling"])[None], None


def register() -> None:
    """Make `attn_implementation="segmented"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(SEGMENTED, segmented_attention)
    AttentionMaskInterface.register(SEGMENTED, sdpa_mask)
