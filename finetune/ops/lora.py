"""LoRA adapters of linear layers on one input: rounded factors, products and gradients.

    y += scale * dropout(x) A^T B^T

A and B are fp32 masters, rounded to x's dtype in every pass. A copy for a whole step would need memory, and could be
out of date: the optimizers of bitsandbytes change a parameter without raising its version.
A frozen A has no gradient; backward then needs x A^T, [T, R], in place of x (FFA-LoRA).

Shapes: T tokens, D inputs, O outputs, R rank, S sum of ranks.
Source: Hu et al. 2021, arXiv:2106.09685; Sun et al. 2024, arXiv:2403.12313.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finetune.ops.matmul import add_matmul_, matmul, matmul_fp32


@dataclass(frozen=True, slots=True)
class Adapter:
    """A trained LoRA adapter. a: [R, D], b: [O, R]. dropout: probability on its input, 0 in eval mode."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """The factors that get a gradient: A and B, or B alone."""
        return (self.a, self.b) if self.a.requires_grad else (self.b,)

    def draw_mask(self, x_TD: Tensor) -> Tensor | None:
        """Draw a dropout mask like nn.Dropout, so that a seed gives the same mask; None without dropout."""
        return torch.empty_like(x_TD, dtype=torch.bool).bernoulli_(1 - self.dropout) if self.dropout else None


@dataclass(frozen=True, slots=True)
class Stack:
    """Adapters on one input with one scale, which share the products with A; in the dtype of the products.

    a_SD: their A, one below the other. members: index of the layer, its columns of x A^T, its B [O, R].
    trains_a: whether A has a gradient. mask: of dropout; then the stack has one adapter.
    low_TS: x A^T, where it is known.
    """

    a_SD: Tensor
    members: list[tuple[int, slice, Tensor]]
    scale: float
    trains_a: bool
    dropout: float = 0.0
    mask: Tensor | None = None
    low_TS: Tensor | None = None

    def input_of(self, x_TD: Tensor) -> Tensor:
        """Return the input of the adapters."""
        return x_TD if self.mask is None else x_TD * self.mask / (1 - self.dropout)


def stack_adapters(
    adapters: Sequence[Adapter | None], masks: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Stack]:
    """Round adapters to a dtype and stack those that share an input; on a GPU in one kernel.

    adapters, masks: one for each layer, None where it has none.
    """
    groups: dict[tuple[float, bool, int], dict[int, Adapter]] = {}
    for i, adapter in enumerate(adapters):
        if adapter:
            alone = not _shares_products(adapter.a.device) or masks[i] is not None  # with dropout the inputs differ
            groups.setdefault((adapter.scale, adapter.a.requires_grad, i if alone else -1), {})[i] = adapter
    stacks: list[Stack] = []
    rounded: list[Tensor] = []
    masters: list[Tensor] = []
    for (scale, trains_a, _), group in groups.items():
        (index, first), *others = group.items()
        if not others and first.a.dtype == first.b.dtype == dtype:
            a_SD, factors_b = first.a, [first.b]
        else:
            ranks = [len(adapter.a) for adapter in group.values()]
            a_SD = first.a.new_empty(sum(ranks), first.a.shape[1], dtype=dtype)
            factors_b = [torch.empty_like(adapter.b, dtype=dtype) for adapter in group.values()]
            rounded += [*a_SD.split(ranks), *factors_b]
            masters += [*(adapter.a for adapter in group.values()), *(adapter.b for adapter in group.values())]
        members, end = [], 0
        for i, b_OR in zip(group, factors_b, strict=True):
            start, end = end, end + b_OR.shape[1]
            members.append((i, slice(start, end), b_OR))
        stacks.append(Stack(a_SD, members, scale, trains_a, first.dropout, masks[index]))
    if masters:
        torch._foreach_copy_(rounded, masters)
    return stacks


def _shares_products(device: torch.device) -> bool:
    """Return whether adapters share products; on a CPU a wider one may add its terms in another order."""
    return device.type != "cpu"


def project_frozen(x_TD: Tensor, stacks: Sequence[Stack]) -> list[Stack]:
    """Compute x A^T of every stack with a frozen A: it is all of x that their backward pass needs."""
    return [
        stack if stack.trains_a else replace(stack, low_TS=matmul(stack.input_of(x_TD), stack.a_SD.T))
        for stack in stacks
    ]


def add_adapters_(outputs: Sequence[Tensor], x_TD: Tensor, stacks: Sequence[Stack]) -> None:
    """Add the adapters' outputs to those of the layers."""
    for stack in stacks:
        low_TS = matmul(stack.input_of(x_TD), stack.a_SD.T) if stack.low_TS is None else stack.low_TS
        for i, columns, b_OR in stack.members:
            add_matmul_(outputs[i], low_TS[:, columns], b_OR.T, stack.scale)


def factor_gradients(
    grads: Sequence[Tensor], x_TD: Tensor | None, stacks: Sequence[Stack]
) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
    """Return what the gradients of inputs and factors need and are.

    x_TD: None if every stack has its `low_TS`.

    Returns:
        For each stack the gradient of x A^T, [T, S], times the scale; for each layer with an adapter the gradients of
        its trained factors: in fp32, on a CPU in the dtype of the products.
    """
    lows, found = [], {}
    for stack in stacks:
        if stack.low_TS is None:
            assert x_TD is not None
            seen_TD = stack.input_of(x_TD)
            low_TS = matmul(seen_TD, stack.a_SD.T, alpha=stack.scale)
        else:
            seen_TD, low_TS = None, stack.low_TS * stack.scale
        grad_TS = torch.empty_like(low_TS)
        for i, columns, b_OR in stack.members:
            matmul(grads[i], b_OR, out_MN=grad_TS[:, columns], alpha=stack.scale)
        grad_a_SD = matmul_fp32(grad_TS.T, seen_TD) if stack.trains_a and seen_TD is not None else None
        for i, columns, _ in stack.members:
            of_a = [] if grad_a_SD is None else [grad_a_SD[columns]]
            found[i] = [*of_a, matmul_fp32(grads[i].T, low_TS[:, columns])]
        lows.append(grad_TS)
    return lows, found


def add_input_gradient_(grad_x_TD: Tensor, grad_TS: Tensor, stack: Stack) -> None:
    """Add the adapters' gradient of their input. grad_TS: from `factor_gradients`."""
    if stack.mask is None:
        add_matmul_(grad_x_TD, grad_TS, stack.a_SD)
    else:
        grad_x_TD += matmul(grad_TS, stack.a_SD) * stack.mask * (1 / (1 - stack.dropout))
