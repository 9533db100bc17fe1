"""Causal attention over packed documents without a mask.

A packed row of T tokens holds S documents. A dense block mask costs T * T. A GPU has a kernel for documents of any
length. Elsewhere, documents of similar length form a batch, padded on the right: under causal attention no token
attends to later positions, so padding needs no mask. Lengths are rounded up to a few distinct values, because CPU
kernels are compiled for each shape.

A layout may use a row several times: documents with a common prefix share its rows, whose hidden states are equal, and
all other parts of the model compute them once.

On a CPU, torch's fused kernel computes the forward pass and plain matrix products the backward pass: that of the fused
kernel is slow and, with grouped heads in bf16, less exact. Scores and their gradients are fp32: the key biases of
Qwen2.5 make scores too large for bf16. A block of queries is multiplied with all its keys at once; keys after the block
are skipped. A CPU without 16-bit matrix products uses the fused kernel in fp32 both ways, which is faster. So does a
GPU before Ampere in bf16.

Shapes: B batch (1 when packed), H heads, T tokens, R rows computed, P places of the layout, L length, D head width.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune.ops.determinism import fix_backward
from finetune.ops.dispatch import fused
from finetune.ops.limits import (
    DOCUMENT_TOKENS_MULTIPLE,
    FUSED_ATTENTION_FROM_TOKENS,
    QUERIES_PER_BLOCK,
    ROWS_MULTIPLE,
)
from finetune.ops.matmul import uses_fp32_matmul
from finetune.system.accelerator import has_flash_attention, kind_of, on_gpu

SEGMENTED = "segmented"


@dataclass(frozen=True, slots=True)
class Segments:
    """The rows of a packed forward pass, and their places in a layout of whole documents.

    rows: R; the first U hold tokens, the others are padding. source [P]: the row at each of P places (any row, for
    padding). place [U]: the first place of each row. identical: rows and layout are equal. shared: some row has several
    places. groups: (documents, padded length) of each group. With a kernel for documents of any length, the padding is
    a document of its own and U is R: cumulative [S + 1] int32 holds the borders, longest the tokens of the longest one.
    """

    rows: int
    source: Tensor
    place: Tensor
    identical: bool = False
    shared: bool = False
    groups: tuple[tuple[int, int], ...] = ()
    cumulative: Tensor | None = None
    longest: int = 0

    def indices(self) -> list[Tensor]:
        """Return the int64 tensors."""
        borders = [] if self.cumulative is None else [self.cumulative.long()]
        return [self.source, self.place, *borders]

    def with_indices(self, indices: Sequence[Tensor]) -> Segments:
        """Return the segments with their tensors on another device."""
        source, place, *borders = indices
        return replace(self, source=source, place=place, cumulative=borders[0].int() if borders else None)

    def to(self, device: torch.device) -> Segments:
        return self.with_indices([index.to(device) for index in self.indices()])


def plan_segments(
    lengths: Sequence[int], row_of_token: Tensor, rows: int, device: torch.device, dtype: torch.dtype
) -> Segments:
    """Build the layout of packed documents, with its tensors on the CPU.

    Args:
        lengths: tokens of each document, T in total.
        row_of_token: [T] on the CPU, the row of each token, of U rows in use; documents with a common prefix share
            rows.
        rows: R, the number of rows with padding.
        device, dtype: of queries, keys and values.
    """
    tokens, used = len(row_of_token), int(row_of_token.max()) + 1
    shared = tokens > used
    if varlen_kernel(device, dtype) is not None:
        padding = [rows - used] if rows > used else []
        source = torch.cat([row_of_token, torch.arange(used, rows)])
        place = torch.cat([first_places(row_of_token, used), torch.arange(tokens, tokens + rows - used)])
        borders = torch.tensor([0, *itertools.accumulate([*lengths, *padding])], dtype=torch.int32)
        return Segments(rows, source, place, not shared, shared, (), borders, max(*lengths, *padding, 0))
    grouped: dict[int, list[Tensor]] = {}
    for document in row_of_token.split(list(lengths)):
        rounded = round_up(len(document), DOCUMENT_TOKENS_MULTIPLE)
        # Padding repeats the last row of a document, so the first place of a row is never padding.
        grouped.setdefault(rounded, []).append(document[torch.arange(rounded).clamp_(max=len(document) - 1)])
    source = torch.cat([document for group in grouped.values() for document in group])
    groups = tuple((len(group), rounded) for rounded, group in grouped.items())
    return Segments(rows, source, first_places(source, used), False, shared, groups)


def round_up(length: int, multiple: int = ROWS_MULTIPLE) -> int:
    """Round a length up to a multiple: few distinct shapes, because CPU kernels are compiled for each."""
    return -(-length // multiple) * multiple


def first_places(source: Tensor, rows: int) -> Tensor:
    """Return the first place [rows] of each row in `source`, which holds the row at each place."""
    places = torch.arange(len(source))
    return torch.full((rows,), len(source)).scatter_reduce_(0, source, places, "amin")


@functools.cache
def varlen_kernel(device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """Return torch's attention over documents of any length; None if device, dtype or this torch do not have it."""
    if not kind_of(device.type).packed_attention or not _has_flash_attention(device, dtype):
        return None
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters.keys()
    if not {"scale", "window_size"} <= parameters:
        return None
    # From torch 2.12 on, grouped heads need this flag. torch 2.11 passes any number of key heads on to the same kernel.
    grouped = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    return functools.partial(varlen_attn, **grouped)


def _has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has flash attention for a GPU and dtype: 16 bits, from NVIDIA's Ampere on."""
    return dtype in (torch.bfloat16, torch.float16) and has_flash_attention(device)


def _runs_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether 16-bit attention runs in fp32: without 16-bit products, and in bf16 on a GPU before Ampere.

    torch's memory-efficient kernel takes fp16 and fp32 there. With bf16, torch would keep the scores [B, H, L, L].
    """
    if on_gpu(device):
        in_fp32 = kind_of(device.type).attention_in_fp32 and dtype == torch.bfloat16
        return in_fp32 and not _has_flash_attention(device, dtype)
    return uses_fp32_matmul(device, dtype)


class _Scatter(torch.autograd.Function):
    """Rows to places. With `summed`, a row's gradient is the sum over its places, else that of its first place."""

    @staticmethod
    def forward(ctx, x: Tensor, segments: Segments, summed: bool) -> Tensor:
        ctx.segments, ctx.summed = segments, summed
        return x.index_select(0, segments.source)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (grad,), segments = grad_outputs, ctx.segments
        if ctx.summed:
            total = torch.zeros(segments.rows, *grad.shape[1:], dtype=torch.float32, device=grad.device)
            return _add_rows_(total, segments.source, grad.float()).to(grad.dtype), None, None
        return _padded(grad.index_select(0, segments.place), segments.rows), None, None


def _add_rows_(total: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Add values to rows of `total`, which may repeat, in a fixed order.

    index_add_ is serial on a CPU and atomic on a GPU; index_put_ sorts on a GPU and is atomic on the threads of a CPU.
    """
    if total.device.type == "cpu":
        return total.index_add_(0, rows, values)
    return total.index_put_((rows,), values, accumulate=True)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, repeat: bool) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.length, ctx.repeat = len(x), repeat
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (rows,), grad = ctx.saved_tensors, grad_outputs[0]
        total = grad.new_zeros(ctx.length, *grad.shape[1:])
        return _add_rows_(total, rows, grad) if ctx.repeat else total.index_copy_(0, rows, grad), None, None


def take_rows(x: Tensor, rows: Tensor, repeat: bool) -> Tensor:
    """Return some rows of x; the gradients of a row add up in a fixed order. repeat: whether a row may occur twice."""
    return _TakeRows.apply(x, rows, repeat)


class _Gather(torch.autograd.Function):
    """Places to rows; padding rows are zero."""

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
    """Compute causal attention within each document, [R, H, D], without dropout.

    Raises:
        ValueError: the segments do not cover the R rows.
    """
    if segments.rows != len(query_RHD):
        raise ValueError(f"segments: cover {segments.rows} rows, found {len(query_RHD)}")
    q, k, v = query_RHD, key_RHD, value_RHD
    if not segments.identical:
        q = _Scatter.apply(q, segments, False)
        k, v = _Scatter.apply(k, segments, segments.shared), _Scatter.apply(v, segments, segments.shared)
    if segments.cumulative is not None:
        kernel, borders, longest = varlen_kernel(q.device, q.dtype), segments.cumulative, segments.longest
        assert kernel is not None  # plan_segments used the same device and dtype
        output = fix_backward(kernel(q, k, v, borders, borders, longest, longest, window_size=(-1, 0), scale=scale))
    else:
        sizes = [documents * length for documents, length in segments.groups]
        parts = zip(segments.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        outputs = []
        for group, *qkv in parts:
            q, k, v = (part.unflatten(0, group).transpose(1, 2) for part in qkv)
            short = q.device.type == "cpu" and group[1] < FUSED_ATTENTION_FROM_TOKENS
            causal = _Attention.apply if short or _runs_in_fp32(q.device, q.dtype) else _fused_attention
            outputs.append(causal(q, k, v, scale).transpose(1, 2).flatten(0, 1))
        output = torch.cat(outputs)
    return output if segments.identical else _Gather.apply(output, segments)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    heads = query.shape[1] // key.shape[1]
    if heads > 1 and on_gpu(query) and not _has_flash_attention(query.device, query.dtype):
        # torch's memory-efficient kernel has no grouped heads; with the flag, torch would keep the scores [B, H, L, L].
        key, value = (x.repeat_interleave(heads, dim=1) for x in (key, value))
        heads = 1
    options = {"is_causal": True, "scale": scale, "enable_gqa": heads > 1}
    return fix_backward(F.scaled_dot_product_attention(query, key, value, **options))


@fused
def _softmax_backward(
    scores: Tensor, grad_probs: Tensor, first: int, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the recomputed probabilities and the gradient of the unscaled scores, both [.., Q, L] in `dtype`.

    scores, grad_probs: fp32 [.., Q, L] of Q queries. first: key position of the first query. scale: of the scores.
    """
    queries, keys = scores.shape[-2:]
    hidden = torch.arange(keys)[None] > torch.arange(queries)[:, None] + first
    probs = (scores * scale).masked_fill(hidden, float("-inf")).softmax(-1)
    delta = (probs * grad_probs).sum(-1, keepdim=True)
    return probs.to(dtype), (probs * (grad_probs - delta) * scale).to(dtype)


class _Attention(torch.autograd.Function):
    """softmax(q k^T * scale) v, causal; saves queries, keys and values [B, H, L, D] for backward."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        if _runs_in_fp32(query.device, query.dtype):
            return _fused_attention(query.float(), key.float(), value.float(), scale).to(query.dtype)
        return _fused_attention(query, key, value, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        if _runs_in_fp32(query.device, query.dtype):
            # The fused kernel in fp32, after a second forward pass.
            with torch.enable_grad():
                q, k, v = (x.detach().float().requires_grad_() for x in (query, key, value))
                grads = torch.autograd.grad(_fused_attention(q, k, v, ctx.scale), (q, k, v), grad_outputs[0].float())
            return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype), None
        q, grad = (x.unflatten(1, (key.shape[1], -1)) for x in (query, grad_outputs[0]))
        k, v = (x.flatten(0, 1) for x in (key, value))
        k_wide, v_wide = k.float(), v.float()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k_wide), torch.zeros_like(v_wide)
        for first in range(0, q.shape[3], QUERIES_PER_BLOCK):
            rows = slice(first, min(first + QUERIES_PER_BLOCK, q.shape[3]))
            seen = slice(0, rows.stop)
            q_block, grad_block = (x[..., rows, :].reshape(len(k), -1, x.shape[-1]) for x in (q, grad))
            scores, grad_probs = (
                x.float().bmm(y[:, seen].mT).unflatten(1, (-1, rows.stop - first))
                for x, y in ((q_block, k_wide), (grad_block, v_wide))
            )
            probs, grad_scores = (
                x.flatten(1, 2) for x in _softmax_backward(scores, grad_probs, first, ctx.scale, query.dtype)
            )
            grad_v[:, seen] += probs.mT.bmm(grad_block)
            grad_k[:, seen] += grad_scores.mT.bmm(q_block)
            grad_q[..., rows, :] = grad_scores.bmm(k[:, seen]).view_as(grad_q[..., rows, :])
        return grad_q.view_as(query), grad_k.view_as(key).to(key.dtype), grad_v.view_as(value).to(value.dtype), None


def segmented_attention(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Compute attention [B, T, H, D] within each segment; plain SDPA without segments.

    An attention function of transformers. segments: a keyword argument of the model's forward.

    Raises:
        ValueError: the segments do not cover the T tokens, or there is a mask or dropout.
    """
    if segments is None:
        if query_BHTD.shape[2] == 1 < query_BHTD.shape[1] // key_BHTD.shape[1] and not torch.is_grad_enabled():
            return _attend_one_token(query_BHTD, key_BHTD, value_BHTD, attention_mask, kwargs["scaling"]), None
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)
    if attention_mask is not None or kwargs.get("dropout"):
        raise ValueError("segments: attention supports no mask and no dropout")
    query, key, value = (x[0].transpose(0, 1) for x in (query_BHTD, key_BHTD, value_BHTD))
    return attend(query, key, value, segments, kwargs["scaling"])[None], None


def _attend_one_token(
    query_BH1D: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Compute the attention [B, 1, H, D] of a generated token: the heads of a group are the queries of their key head.

    transformers copies all keys and values for every query head. mask: [B, 1, 1, L].
    """
    query_BKGD = query_BH1D.squeeze(2).unflatten(1, (key_BKLD.shape[1], -1))
    output_BKGD = F.scaled_dot_product_attention(query_BKGD, key_BKLD, value_BKLD, mask, scale=scale)
    return output_BKGD.flatten(1, 2)[:, None]


def register() -> None:
    """Register `attn_implementation="segmented"` in transformers. A second call changes nothing."""
    AttentionInterface.register(SEGMENTED, segmented_attention)
    AttentionMaskInterface.register(SEGMENTED, sdpa_mask)
