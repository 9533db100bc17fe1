"""Frozen linear layers with or without a LoRA adapter: several on one input, with minimal saved tensors.

    y = x W^T + b + scale * dropout(x) A^T B^T

W is frozen. It may be 4-bit: it is dequantized before each product and freed after it. Saved for backward: x, once for
all projections that read it, if one has an adapter; x A^T alone if A is frozen; in the MLP also gate and up.
Everything else is recomputed.

Shapes: T tokens, D inputs, O outputs, I intermediate width.
Source: Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.ops.dequantize import dequantize
from finetune.ops.elementwise import swiglu_backward_, swiglu_forward
from finetune.ops.limits import MLP_FORWARD_ROWS, MLP_MOST_TILE_ROWS, MLP_ROWS, MLP_TILES
from finetune.ops.lora import (
    Adapter,
    Stack,
    add_adapters_,
    add_input_gradient_,
    factor_gradients,
    project_frozen,
    stack_adapters,
)
from finetune.ops.matmul import add_matmul_, matmul


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
    outputs = _Project.apply(x.reshape(-1, x.shape[-1]), tuple(projections), *_trained(projections))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def swiglu_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection, tile_rows: int | None = None) -> Tensor:
    """down(silu(gate(x)) * up(x)); x: [..., D].

    tile_rows: compute at least so many rows at a time and save x alone; backward computes gate and up again. None saves
    them. Dropout needs all rows at once: blocks would draw other masks from the same seed.
    """
    dropout = any(p.adapter and p.adapter.dropout for p in (gate, up, down))
    if tile_rows is not None and not dropout:
        projections = (gate, up, down)
        x_TD = _Keep.apply(x.reshape(-1, x.shape[-1]))
        rows = max(tile_rows, min(len(x_TD) // MLP_TILES, MLP_MOST_TILE_ROWS))
        return _TiledMlp.apply(x_TD, projections, x_TD.grad_fn, rows, *_trained(projections)).view(x.shape)
    plain = all(p.quant_state is None and not (p.adapter and p.adapter.dropout) for p in (gate, up, down))
    if plain and x.device.type == "cpu" and x.is_contiguous() and not torch.is_grad_enabled():
        y = torch.empty_like(x)
        for x_BD, y_BD in zip(*(t.view(-1, x.shape[-1]).split(MLP_FORWARD_ROWS) for t in (x, y)), strict=True):
            y_BD.copy_(_swiglu_mlp(x_BD, gate, up, down))
        return y
    return _swiglu_mlp(x, gate, up, down)


def _swiglu_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    projections = (gate, up, down)
    # A frozen down saves nothing. Outside the function, gradient checkpointing does not recompute it.
    inside = projections if down.adapter else projections[:2]
    x_TD = x.reshape(-1, x.shape[-1])
    # All rows on a GPU, and with dropout: blocks would draw other masks from the same seed.
    whole = x.device.type != "cpu" or any(p.adapter and p.adapter.dropout for p in projections)
    blocks = (x_TD,) if whole or len(x_TD) <= MLP_ROWS else x_TD.split(MLP_ROWS)
    outputs = [_SwigluMlp.apply(x_BD, inside, *_trained(projections)) for x_BD in blocks]
    if not down.adapter:
        outputs = [project(y_BI, (down,))[0] for y_BI in outputs]
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).view(x.shape)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, projections: tuple[Projection, ...], *factors: Tensor) -> tuple[Tensor, ...]:
        stacks, kept = _first_stacks(projections, x_TD)
        ctx.projections = projections
        ctx.save_for_backward(x_TD if _trains_a(projections) else None, *kept)
        return _forward(x_TD, projections, stacks)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TD, *kept = ctx.saved_tensors
        stacks = _stacks(ctx.projections, grad_outputs[0], kept)
        grad_x, factors = _backward(grad_outputs, x_TD, ctx.projections, stacks, wants_x=ctx.needs_input_grad[0])
        return grad_x, None, *factors


class _SwigluMlp(torch.autograd.Function):
    """silu(gate) * up, and the down projection if it has an adapter, whose input is recomputed in backward."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, projections: tuple[Projection, ...], *factors: Tensor) -> Tensor:
        inner, down = projections[:2], projections[2:]
        stacks, kept = _first_stacks(inner, x_TD)
        gate_TI, up_TI = _forward(x_TD, inner, stacks)
        y, kept_down = swiglu_forward(gate_TI, up_TI), []
        if down:
            stacks, kept_down = _first_stacks(down, y)
            (y,) = _forward(y, down, stacks)
        ctx.projections = projections
        ctx.save_for_backward(x_TD if _trains_a(inner) else None, gate_TI, up_TI, *kept_down, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inner, down = ctx.projections[:2], ctx.projections[2:]
        x_TD, gate_TI, up_TI, *kept = ctx.saved_tensors
        grad, down_factors = grad_outputs[0], []
        if down:
            stacks, kept = _stacks(down, grad, kept[:2]), kept[2:]  # its mask and its x A^T
            product_TI = swiglu_forward(gate_TI, up_TI) if _trains_a(down) else None
            lows, down_factors = _grad_factors([grad], product_TI, down, stacks)
            grad = _grad_input([grad], down, stacks, lows)
        # Overwrites saved tensors: autograd's version check makes a second backward pass an error.
        swiglu_backward_(grad, gate_TI, up_TI)
        stacks = _stacks(inner, grad, kept)
        grad_x, factors = _backward((gate_TI, up_TI), x_TD, inner, stacks, wants_x=ctx.needs_input_grad[0])
        return grad_x, None, *factors, *down_factors


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
        inner, down = projections[:2], projections[2:]
        stacks, stacks_down = _stacks(inner, x_TD), _stacks(down, x_TD)
        y_TD = torch.empty_like(x_TD)
        for x_BD, y_BD in zip(x_TD.split(tile_rows), y_TD.split(tile_rows), strict=True):
            # Without a name, the product is free before the next tile makes its own.
            y_BD.copy_(_forward(swiglu_forward(*_forward(x_BD, inner, stacks)), down, stacks_down)[0])
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inner, down = ctx.projections[:2], ctx.projections[2:]
        (x_TD,), wants_x = (ctx.kept or ctx).saved_tensors, ctx.needs_input_grad[0]
        stacks, stacks_down = _stacks(inner, x_TD), _stacks(down, x_TD)
        grad_x_TD = torch.empty_like(x_TD) if wants_x else None
        sums: list[Tensor] = []
        for first in range(0, len(x_TD), ctx.tile_rows):
            rows = slice(first, first + ctx.tile_rows)
            x_BD, grad_BD = x_TD[rows], grad_outputs[0][rows]
            gate_BI, up_BI = _forward(x_BD, inner, stacks)
            lows, down_parts = [], []
            if stacks_down:
                lows, down_parts = _grad_factors([grad_BD], swiglu_forward(gate_BI, up_BI), down, stacks_down)
            swiglu_backward_(_grad_input([grad_BD], down, stacks_down, lows), gate_BI, up_BI)
            out_BD = None if grad_x_TD is None else grad_x_TD[rows]
            _, parts = _backward((gate_BI, up_BI), x_BD, inner, stacks, wants_x=wants_x, out_TD=out_BD)
            del gate_BI, up_BI  # before the next tile makes its own
            parts += down_parts
            if sums:
                torch._foreach_add_(sums, parts)
            else:
                sums = parts
        return grad_x_TD, None, None, None, *sums


def _trained(projections: Sequence[Projection]) -> list[Tensor]:
    return [factor for p in projections if p.adapter for factor in p.adapter.trained]


def _trains_a(projections: Sequence[Projection]) -> bool:
    return any(p.adapter and p.adapter.a.requires_grad for p in projections)


def _first_stacks(projections: Sequence[Projection], x_TD: Tensor) -> tuple[list[Stack], list[Tensor | None]]:
    """Return the adapters of projections, and what `_stacks` needs to make them again in backward.

    That is a mask of dropout or None for each projection, then x A^T or None for each stack.
    """
    masks = [p.adapter.draw_mask(x_TD) if p.adapter else None for p in projections]
    stacks = project_frozen(x_TD, _stacks(projections, x_TD, masks))
    return stacks, [*masks, *(stack.low_TS for stack in stacks)]


def _stacks(projections: Sequence[Projection], like: Tensor, kept: Sequence[Tensor | None] = ()) -> list[Stack]:
    """Return the adapters of projections in the dtype of a tensor. kept: from `_first_stacks`, or empty."""
    count = len(projections)
    stacks = stack_adapters([p.adapter for p in projections], kept[:count] or [None] * count, like.dtype)
    lows = kept[count:] or [None] * len(stacks)
    return [replace(stack, low_TS=low) for stack, low in zip(stacks, lows, strict=True)]


def _forward(x_TD: Tensor, projections: Sequence[Projection], stacks: Sequence[Stack]) -> tuple[Tensor, ...]:
    biases = (None if p.bias is None else p.bias.to(x_TD.dtype) for p in projections)
    outputs = tuple(
        matmul(x_TD, p.dequantized(x_TD.dtype).T, bias) for p, bias in zip(projections, biases, strict=True)
    )
    add_adapters_(outputs, x_TD, stacks)
    return outputs


def _backward(
    grads: Sequence[Tensor],
    x_TD: Tensor | None,
    projections: Sequence[Projection],
    stacks: Sequence[Stack],
    *,
    wants_x: bool,
    out_TD: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradient of x, if wanted, and those of the adapters.

    x_TD: None if no gradient needs it. out_TD: takes the gradient of x.
    """
    lows, factors = _grad_factors(grads, x_TD, projections, stacks)
    return _grad_input(grads, projections, stacks, lows, out_TD) if wants_x else None, factors


def _grad_factors(
    grads: Sequence[Tensor], x_TD: Tensor | None, projections: Sequence[Projection], stacks: Sequence[Stack]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what `_grad_input` needs of the adapters, and the gradients of their trained factors, as `_trained`."""
    lows, found = factor_gradients(grads, x_TD, stacks)
    factors = [
        grad.to(master.dtype)
        for i, p in enumerate(projections)
        if p.adapter
        for grad, master in zip(found[i], p.adapter.trained, strict=True)
    ]
    return lows, factors


def _grad_input(
    grads: Sequence[Tensor],
    projections: Sequence[Projection],
    stacks: Sequence[Stack],
    lows: Sequence[Tensor],
    out_TD: Tensor | None = None,
) -> Tensor:
    grad_x_TD: Tensor | None = None
    for i, (grad_TO, p) in enumerate(zip(grads, projections, strict=True)):
        grad_x_TD = _add_frozen_gradient(grad_x_TD, grad_TO, p, out_TD)
        for stack, grad_TS in zip(stacks, lows, strict=True):
            if stack.members[-1][0] == i:
                add_input_gradient_(grad_x_TD, grad_TS, stack)
    assert grad_x_TD is not None
    return grad_x_TD


def _add_frozen_gradient(grad_x_TD: Tensor | None, grad_TO: Tensor, p: Projection, out_TD: Tensor | None) -> Tensor:
    weight_OD = p.dequantized(grad_TO.dtype)
    if grad_x_TD is None:
        return matmul(grad_TO, weight_OD, out_MN=out_TD)
    return add_matmul_(grad_x_TD, grad_TO, weight_OD)
