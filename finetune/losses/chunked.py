"""The engine under every loss on logits: a head's loss and its gradient, with few rows of logits alive at once.

A loss says what a chunk of logits costs and how that cost changes with them (a `ChunkLoss`); the engine makes the
logits, multiplies that gradient back through the head in the same forward pass, and lets the chunk die before the next
one is made. So nothing of vocabulary width is ever kept for the backward pass, and no product is made twice.

Shapes: N rows that carry a target, D hidden width, V vocabulary rows.
Source: the idea of Hsu et al. 2024, arXiv:2410.10989 (fused linear cross-entropy).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from finetune.ops.limits import LOGITS_VALUES
from finetune.ops.matmul import matmul

# (logits [n, V], which of the N rows they are) -> (sum of nats, fp32 scalar; its gradient with respect to the logits).
# The logits come as the product left them, in fp32 or 16 bit: the loss computes in fp32, and may overwrite them and
# return them as the gradient. It runs without autograd.
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def chunked_loss(hidden_ND: Tensor, head: nn.Module, vocabulary: int, loss: ChunkLoss) -> Tensor:
    """Sum of a loss over N rows' logits, fp32, in nats; differentiable in the hidden states and in what is trained of
    the head, once.

    vocabulary: V, rows of the head that take part, from the first on.
    N = 0 gives 0, and a gradient of 0 to everything, so that DDP misses nothing.
    A frozen head costs two products of N * V * D; one that is trained in part (LoRA, new tokens, a saved copy) runs as
    the module it is and costs its own weights' gradients besides.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _ChunkedLoss.apply(hidden_ND, head, vocabulary, loss, *trained)


@torch.no_grad()
def chunked_logits(hidden_ND: Tensor, head: nn.Module, vocabulary: int) -> Iterator[tuple[Tensor, slice]]:
    """Chunk after chunk, the logits [n, V] and which of the N rows they are; the next chunk overwrites them."""
    logits_NV = None
    for rows in _chunks(len(hidden_ND), vocabulary, hidden_ND.device):
        logits_NV = logits_of(hidden_ND[rows], head, vocabulary, logits_NV)
        yield logits_NV, rows


@torch.no_grad()
def logits_of(hidden_ND: Tensor, head: nn.Module, vocabulary: int, place_NV: Tensor | None = None) -> Tensor:
    """Logits [n, V] of few rows, which the caller may overwrite; in the place of earlier ones, where they fit."""
    plain = _as_plain(head)
    return head(hidden_ND)[:, :vocabulary] if plain is None else _product(hidden_ND, plain, vocabulary, place_NV)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND: Tensor, head: nn.Module, vocabulary: int, loss: ChunkLoss, *trained: Tensor) -> Tensor:
        plain = None if trained else _as_plain(head)
        if plain is None:
            total, gradients = _through_module(hidden_ND, head, vocabulary, loss, trained)
        else:
            total, gradients = _through_frozen(hidden_ND, plain, vocabulary, loss)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *trained = (gradient * grad_outputs[0].to(gradient.dtype) for gradient in ctx.saved_tensors)
        return hidden, None, None, None, *trained


def _through_frozen(
    hidden_ND: Tensor, head: nn.Linear, vocabulary: int, loss: ChunkLoss
) -> tuple[Tensor, list[Tensor]]:
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    gradient_ND = torch.empty_like(hidden_ND)
    for logits_NV, rows in chunked_logits(hidden_ND, head, vocabulary):
        nats, dlogits_NV = loss(logits_NV, rows)
        total += nats
        matmul(dlogits_NV.to(hidden_ND.dtype), head.weight[:vocabulary], out_MN=gradient_ND[rows])
    return total, [gradient_ND]


def _through_module(
    hidden_ND: Tensor, head: nn.Module, vocabulary: int, loss: ChunkLoss, trained: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor]]:
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    gradient_ND = torch.empty_like(hidden_ND)
    gradients = [torch.zeros_like(parameter) for parameter in trained]
    # A trained copy of the head keeps fp32 weights and rounds the whole matrix whenever it is read: here once.
    with parametrize.cached():
        for rows in _chunks(len(hidden_ND), vocabulary, hidden_ND.device):
            with torch.enable_grad():
                leaf_ND = hidden_ND[rows].detach().requires_grad_()
                logits_NV = head(leaf_ND)[:, :vocabulary]
            nats, dlogits_NV = loss(logits_NV.detach(), rows)
            total += nats
            gradient_ND[rows], *parts = torch.autograd.grad(
                logits_NV, [leaf_ND, *trained], dlogits_NV.to(logits_NV.dtype), allow_unused=True
            )
            for gradient, part in zip(gradients, parts, strict=True):
                if part is not None:
                    gradient += part
    return total, [gradient_ND, *gradients]


def _as_plain(head: nn.Module) -> nn.Linear | None:
    """The head where it is nothing but a matrix (and a bias), whose products the engine may make itself."""
    wrapped = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return head if type(head) is nn.Linear and not wrapped else None


def _chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Chunks of nearly one length: a short last one would read the whole head for little."""
    limit = LOGITS_VALUES["cuda" if device.type == "cuda" else "cpu"]
    count = math.ceil(rows / max(1, limit // vocabulary))
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)


def _product(hidden_ND: Tensor, head: nn.Linear, vocabulary: int, place_NV: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias of the first rows; in the place of earlier logits of that shape, where there are any.

    Sums are fp32. On a GPU the result is fp32 too. A CPU's 16-bit product rounds it once to 16 bit, as every PyTorch
    model does: public torch has no product from 16 bit to fp32 there, and one in fp32 takes three times as long. It
    leaves the loss within 2e-5 and the gradient within 0.4 % of float64, as it leaves stock's.
    """
    weight_VD, bias = head.weight[:vocabulary], None if head.bias is None else head.bias[:vocabulary]
    wide = hidden_ND.is_cuda and torch.version.hip is None and hidden_ND.dtype != torch.float32
    if wide:
        logits_NV = torch.mm(hidden_ND, weight_VD.t(), out_dtype=torch.float32)
        return logits_NV if bias is None else logits_NV.add_(bias)
    if place_NV is not None and len(place_NV) != len(hidden_ND):
        place_NV = None
    return matmul(hidden_ND, weight_VD.t(), bias, place_NV)
