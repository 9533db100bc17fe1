"""The elementwise steps of a decoder layer, each with an explicit backward pass.

Every kernel is plain torch that computes in fp32 and rounds where the model rounds; compiled, it reads and writes each
tensor once. Shapes: T tokens, D hidden width, I intermediate width, H heads, W head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.ops.dispatch import fused


@fused
def rms_norm_forward(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight: normalized in fp32, rounded to x's dtype before the weight, like Qwen2."""
    wide = x_TD.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_TD.dtype)


@fused
def rms_norm_backward(grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Gradient of x. Source: Zhang & Sennrich 2019, arXiv:1910.07467."""
    wide = x_TD.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    inner = grad_TD.float() * weight_D.float()
    normed = wide * scale
    return ((inner - normed * (inner * normed).mean(-1, keepdim=True)) * scale).to(x_TD.dtype)


@fused
def swiglu_forward(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up. Source: Shazeer 2020, arXiv:2002.05202."""
    wide = gate_TI.float()
    # In place: plain torch would hold five matrices of this size, too many for a streamed teacher.
    return torch.sigmoid(wide).mul_(wide).to(gate_TI.dtype).mul_(up_TI)


@fused
def swiglu_backward_(grad_TI: Tensor, gate_TI: Tensor, up_TI: Tensor) -> None:
    """Overwrite gate and up with their gradients."""
    gate, up, grad = gate_TI.float(), up_TI.float(), grad_TI.float()
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    grad_gate = grad * up * (sigmoid + activated * (1 - sigmoid))
    up_TI.copy_(grad * activated)
    gate_TI.copy_(grad_gate)


@fused
def apply_rope_forward(x_THW: Tensor, cos_TW: Tensor, sin_TW: Tensor) -> Tensor:
    """Rotary position embedding in x's dtype, like Qwen2. Source: Su et al. 2021, arXiv:2104.09864."""
    half = x_THW.shape[-1] // 2
    turned = torch.cat((-x_THW[..., half:], x_THW[..., :half]), dim=-1)
    return x_THW * cos_TW[:, None] + turned * sin_TW[:, None]


@fused
def apply_rope_backward(grad_THW: Tensor, cos_TW: Tensor, sin_TW: Tensor) -> Tensor:
    """The transpose of `apply_rope_forward`: rotation by the negative angle."""
    half = grad_THW.shape[-1] // 2
    weighted = grad_THW * sin_TW[:, None]
    return grad_THW * cos_TW[:, None] + torch.cat((weighted[..., half:], -weighted[..., :half]), dim=-1)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm_forward(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return rms_norm_backward(grad_outputs[0].contiguous(), x, weight, ctx.eps), None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return apply_rope_forward(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return apply_rope_backward(grad_outputs[0], *ctx.saved_tensors), None, None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm with a frozen weight; saves only x for backward."""
    return _RmsNorm.apply(x_TD, weight_D, eps)


def apply_rope(x_THW: Tensor, cos_TW: Tensor, sin_TW: Tensor) -> Tensor:
    """Rotary position embedding; saves only the angles, which all layers share."""
    return _Rope.apply(x_THW, cos_TW, sin_TW)
