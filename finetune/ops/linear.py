"""Frozen linear layers with or without a LoRA adapter: several on one input, with minimal saved tensors.

    y = x W^T + b + scale * dropout(x) A^T B^T

W is frozen. It may be 4-bit: it is dequantized before each product and freed after it. A and B are fp32 masters,
rounded to x's dtype inside. Saved for backward: x, once for all projections that read it, if one has an adapter; in
the MLP also gate and up. Everything else is recomputed.

Shapes: T tokens, D inputs, O outputs, I intermediate width, R rank.
Source: Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.ops.dequantize import dequantize
from finetune.ops.elementwise import swiglu_backward_, swiglu_forward
from finetune.ops.limits import MLP_FORWARD_ROWS, MLP_MOST_TILE_ROWS, MLP_ROWS, MLP_TILES
from finetune.ops.matmul import add_matmul_, matmul


@dataclass(frozen=True, slots=True)
class Adapter:
    """A trained LoRA adapter. a: [R, D], b: [O, R]. dropout: probability on its input, 0 in eval mode."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer. Weight and bias are rounded to the dtype of the input, as autocast does.

    weight: [O, D], or packed 4-bit with the `quant_state` of bitsandbytes.
    """

    weight: Tensor
    bias: Tensor | None = None
    quant_state: Any = None
    adapter: Adapter | None = None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [O, D]; on a GPU, in a buffer that the next call overwrites."""
        return (self.weight if self.quant_state is None else dequantize(self.weight, self.quant_state)).to(dtype)


def project(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Apply several linear layers to x [..., D], in its dtype; returns one [..., O] each."""
    factors = [factor for p in projections if p.adapter for factor in (p.adapter.a, p.adapter.b)]
    outputs = _Project.apply(x.reshape(-1, x.shape[-1]), tuple(projections), *factors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def swiglu_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection, tile_rows: int | None = None) -> Tensor:
    """down(silu(gate(x)) * up(x)); x: [..., D].

    tile_rows: compute at least so many rows at a time and save x alone; backward computes gate and up again. None saves
    them. Dropout needs all rows at once: blocks would draw other masks from the same seed.
    """
    dropout = any(p.adapter and p.adapter.dropout for p in (gate, up, down))
    if tile_rows is not None and not dropout:
        projections = (gate, up, down)
        factors = [factor for p in projections if p.adapter for factor in (p.adapter.a, p.adapter.b)]
        x_TD = _Keep.apply(x.reshape(-1, x.shape[-1]))
        rows = max(tile_rows, min(len(x_TD) // MLP_TILES, MLP_MOST_TILE_ROWS))
        return _TiledMlp.apply(x_TD, projections, x_TD.grad_fn, rows, *factors).view(x.shape)
    plain = all(p.quant_state is None and not (p.adapter and p.adapter.dropout) for p in (gate, up, down))
    if plain and x.device.type == "cpu" and x.is_contiguous() and not torch.is_grad_enabled():
        y = torch.empty_like(x)
        for x_BD, y_BD in zip(*(t.view(-1, x.shape[-1]).split(MLP_FORWARD_ROWS) for t in (x, y)), strict=True):
            y_BD.copy_(_swiglu_mlp(x_BD, gate, up, down))
        return y
    return _swiglu_mlp(x, gate, up, down)


def _swiglu_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    projections = (gate, up, down)
    factors = [factor for p in projections if p.adapter for factor in (p.adapter.a, p.adapter.b)]
    # A frozen down saves nothing. Outside the function, gradient checkpointing does not recompute it.
    inside = projections if down.adapter else projections[:2]
    x_TD = x.reshape(-1, x.shape[-1])
    # All rows on a GPU, and with dropout: blocks would draw other masks from the same seed.
    whole = x.device.type != "cpu" or any(p.adapter and p.adapter.dropout for p in projections)
    blocks = x_TD.split(len(x_TD) if whole else MLP_ROWS)
    outputs = [_SwigluMlp.apply(x_BD, inside, *factors) for x_BD in blocks]
    if not down.adapter:
        outputs = [project(y_BI, (down,))[0] for y_BI in outputs]
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).view(x.shape)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, projections: tuple[Projection, ...], *factors: Tensor) -> tuple[Tensor, ...]:
        masks = [_draw_mask(x_TD, p) for p in projections]
        outputs = tuple(_forward(x_TD, p, mask) for p, mask in zip(projections, masks, strict=True))
        ctx.projections = projections
        ctx.save_for_backward(x_TD if factors else None, *masks)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TD, *masks = ctx.saved_tensors
        grad_x, factors = None, []
        for p, grad_TO, mask in zip(ctx.projections, grad_outputs, masks, strict=True):
            grad_x, grad_factors = _backward(grad_TO, x_TD, p, mask, grad_x, wants_x=ctx.needs_input_grad[0])
            factors += grad_factors
        return grad_x, None, *factors


class _SwigluMlp(torch.autograd.Function):
    """silu(gate) * up, and the down projection if it has an adapter, whose input is recomputed in backward."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, projections: tuple[Projection, ...], *factors: Tensor) -> Tensor:
        gate, up, *downs = projections
        masks = [_draw_mask(x_TD, gate), _draw_mask(x_TD, up)]
        gate_TI, up_TI = _forward(x_TD, gate, masks[0]), _forward(x_TD, up, masks[1])
        y = swiglu_forward(gate_TI, up_TI)
        for down in downs:
            masks.append(_draw_mask(y, down))
            y = _forward(y, down, masks[-1])
        ctx.projections = projections
        ctx.save_for_backward(x_TD if gate.adapter or up.adapter else None, gate_TI, up_TI, *masks)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up, *downs = ctx.projections
        x_TD, gate_TI, up_TI, *masks = ctx.saved_tensors
        grad, down_factors = grad_outputs[0], []
        for down in downs:
            down_factors = _grad_factors(grad, swiglu_forward(gate_TI, up_TI), down, masks[2])
            grad = _grad_input(grad, down, masks[2], None)
        # Overwrites saved tensors: autograd's version check makes a second backward pass an error.
        swiglu_backward_(grad, gate_TI, up_TI)
        grad_x, gate_factors = _backward(gate_TI, x_TD, gate, masks[0], None, wants_x=ctx.needs_input_grad[0])
        grad_x, up_factors = _backward(up_TI, x_TD, up, masks[1], grad_x, wants_x=ctx.needs_input_grad[0])
        return grad_x, None, *gate_factors, *up_factors, *down_factors


class _Keep(torch.autograd.Function):
    """The identity; its node keeps x for a later node that saves nothing itself.

    Gradient checkpointing recomputes up to the last saved tensor. A node saves after its forward pass, so the whole MLP
    would run again for its own input.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD)
        return x_TD.view_as(x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:  # type: ignore[override]
        return grad_outputs[0]


class _TiledMlp(torch.autograd.Function):
    """An MLP some rows at a time, so that no matrix [T, I] exists. kept: the node that keeps x, if x has a gradient.

    Source: Arctic long sequence training, Bekman et al. 2025, arXiv:2506.13996 (tiled MLP).
    """

    @staticmethod
    def forward(
        ctx, x_TD: Tensor, projections: tuple[Projection, ...], kept: Any, tile_rows: int, *factors: Tensor
    ) -> Tensor:
        ctx.projections, ctx.kept, ctx.tile_rows = projections, kept, tile_rows
        if kept is None:
            ctx.save_for_backward(x_TD)
        gate, up, down = projections
        y_TD = torch.empty_like(x_TD)
        for x_BD, y_BD in zip(x_TD.split(tile_rows), y_TD.split(tile_rows), strict=True):
            # Without a name, the product is free before the next tile makes its own.
            y_BD.copy_(_forward(swiglu_forward(_forward(x_BD, gate, None), _forward(x_BD, up, None)), down, None))
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up, down = ctx.projections
        (x_TD,), wants_x = (ctx.kept or ctx).saved_tensors, ctx.needs_input_grad[0]
        grad_x_TD = torch.empty_like(x_TD) if wants_x else None
        sums: list[Tensor] = []
        for first in range(0, len(x_TD), ctx.tile_rows):
            rows = slice(first, first + ctx.tile_rows)
            x_BD, grad_BD = x_TD[rows], grad_outputs[0][rows]
            gate_BI, up_BI = _forward(x_BD, gate, None), _forward(x_BD, up, None)
            parts = _grad_factors(grad_BD, swiglu_forward(gate_BI, up_BI), down, None) if down.adapter else []
            swiglu_backward_(_grad_input(grad_BD, down, None, None), gate_BI, up_BI)
            grad_x_BD, gate_parts = _backward(gate_BI, x_BD, gate, None, None, wants_x=wants_x)
            grad_x_BD, up_parts = _backward(up_BI, x_BD, up, None, grad_x_BD, wants_x=wants_x)
            del gate_BI, up_BI  # before the next tile makes its own
            if grad_x_TD is not None and grad_x_BD is not None:
                grad_x_TD[rows] = grad_x_BD
            parts = [*gate_parts, *up_parts, *parts]
            sums = [total.add_(part) for total, part in zip(sums, parts, strict=True)] if sums else parts
        return grad_x_TD, None, None, None, *sums


def _draw_mask(x_TD: Tensor, p: Projection) -> Tensor | None:
    """Draw the dropout mask of an adapter like nn.Dropout, so that a seed gives the same mask."""
    if not p.adapter or not p.adapter.dropout:
        return None
    return torch.empty_like(x_TD, dtype=torch.bool).bernoulli_(1 - p.adapter.dropout)


def _dropped(x_TD: Tensor, p: Projection, mask: Tensor | None) -> Tensor:
    return x_TD if mask is None or not p.adapter else x_TD * mask / (1 - p.adapter.dropout)


def _forward(x_TD: Tensor, p: Projection, mask: Tensor | None) -> Tensor:
    weight_OD, bias_O = p.dequantized(x_TD.dtype), None if p.bias is None else p.bias.to(x_TD.dtype)
    y_TO = matmul(x_TD, weight_OD.T, bias_O)
    if p.adapter:
        a_RD, b_OR = p.adapter.a.to(x_TD.dtype), p.adapter.b.to(x_TD.dtype)
        add_matmul_(y_TO, matmul(_dropped(x_TD, p, mask), a_RD.T), b_OR.T, p.adapter.scale)
    return y_TO


def _backward(
    grad_TO: Tensor, x_TD: Tensor | None, p: Projection, mask: Tensor | None, grad_x: Tensor | None, *, wants_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Add this projection's gradient of x to `grad_x`; return it and the gradients of the adapter."""
    factors = [] if x_TD is None else _grad_factors(grad_TO, x_TD, p, mask)
    return _grad_input(grad_TO, p, mask, grad_x) if wants_x else None, factors


def _grad_input(grad_TO: Tensor, p: Projection, mask: Tensor | None, grad_x: Tensor | None) -> Tensor:
    weight_OD = p.dequantized(grad_TO.dtype)
    grad_x = matmul(grad_TO, weight_OD) if grad_x is None else add_matmul_(grad_x, grad_TO, weight_OD)
    if p.adapter:
        grad_TR = matmul(grad_TO, p.adapter.b.to(grad_TO.dtype))
        a_RD = p.adapter.a.to(grad_TO.dtype)
        if mask is None:
            add_matmul_(grad_x, grad_TR, a_RD, p.adapter.scale)
        else:
            grad_x += matmul(grad_TR, a_RD) * mask * (p.adapter.scale / (1 - p.adapter.dropout))
    return grad_x


def _grad_factors(grad_TO: Tensor, x_TD: Tensor, p: Projection, mask: Tensor | None) -> list[Tensor]:
    """Return the gradients of A and B in fp32; none without an adapter."""
    if not p.adapter:
        return []
    a, b, scale = p.adapter.a, p.adapter.b, p.adapter.scale
    seen_TD = _dropped(x_TD, p, mask)
    grad_a = matmul(matmul(grad_TO, b.to(grad_TO.dtype)).T, seen_TD)
    grad_b = matmul(grad_TO.T, matmul(seen_TD, a.to(x_TD.dtype).T))
    return [grad_a.to(a.dtype).mul_(scale), grad_b.to(b.dtype).mul_(scale)]
