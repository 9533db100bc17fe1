"""Causal attention on a CPU: torch's fused kernel forward, plain matrix products backward.

The backward pass of the fused kernel is slow and, with grouped heads in bf16, less exact. Here scores and their
gradients are fp32: the key biases of Qwen2.5 make scores too large for bf16. A block of queries is multiplied with all
its keys at once; keys after the block are skipped. A CPU without 16-bit matrix products uses the fused kernel in fp32
both ways, which is faster. Saved for backward: queries, keys and values.

Shapes: N documents of one padded length L, H heads, K key heads, G = H / K, Q queries per block, W head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.ops.dispatch import fused
from finetune.ops.limits import QUERIES_PER_BLOCK
from finetune.ops.matmul import uses_fp32_matmul


@fused
def softmax_backward(
    scores: Tensor, grad_probs: Tensor, first: int, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the recomputed probabilities and the gradient of the unscaled scores, both in `dtype`.

    Args:
        scores: fp32 [.., Q, L].
        grad_probs: fp32 [.., Q, L].
        first: key position of the first query.
        scale: factor of the scores.
        dtype: of the results.
    """
    queries, keys = scores.shape[-2:]
    hidden = torch.arange(keys)[None] > torch.arange(queries)[:, None] + first
    probs = (scores * scale).masked_fill(hidden, float("-inf")).softmax(-1)
    delta = (probs * grad_probs).sum(-1, keepdim=True)
    return probs.to(dtype), (probs * (grad_probs - delta) * scale).to(dtype)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        if uses_fp32_matmul(query.device, query.dtype):
            return _fused(query.float(), key.float(), value.float(), scale).to(query.dtype)
        return _fused(query, key, value, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        if uses_fp32_matmul(query.device, query.dtype):
            return (*_wide_backward(grad_outputs[0], query, key, value, ctx.scale), None)
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
                x.flatten(1, 2) for x in softmax_backward(scores, grad_probs, first, ctx.scale, query.dtype)
            )
            grad_v[:, seen] += probs.mT.bmm(grad_block)
            grad_k[:, seen] += grad_scores.mT.bmm(q_block)
            grad_q[..., rows, :] = grad_scores.bmm(k[:, seen]).view_as(grad_q[..., rows, :])
        return grad_q.view_as(query), grad_k.view_as(key).to(key.dtype), grad_v.view_as(value).to(value.dtype), None


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


def _wide_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients by the fused kernel in fp32, after a second forward pass."""
    with torch.enable_grad():
        q, k, v = (x.detach().float().requires_grad_() for x in (query, key, value))
        grad_q, grad_k, grad_v = torch.autograd.grad(_fused(q, k, v, scale), (q, k, v), grad.float())
    return grad_q.to(query.dtype), grad_k.to(key.dtype), grad_v.to(value.dtype)


def causal_attention(query_NHLW: Tensor, key_NKLW: Tensor, value_NKLW: Tensor, scale: float) -> Tensor:
    """Return softmax(q k^T * scale) v [N, H, L, W], causal within each document."""
    return _CausalAttention.apply(query_NHLW, key_NKLW, value_NKLW, scale)
