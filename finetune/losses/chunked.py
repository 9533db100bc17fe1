"""Losses on logits, with only a few rows of logits alive at once.

A `ChunkLoss` returns the loss of a chunk of logits and its gradient. The engine computes the logits, multiplies that
gradient with the head in the same forward pass, and frees the chunk before the next one. Nothing of vocabulary width
is kept for backward, and no matrix product is computed twice.

Shapes: N rows that carry a target, D hidden width, V vocabulary rows.
Source: Hsu et al. 2024, arXiv:2410.10989 (fused linear cross-entropy).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from finetune.ops.cross_entropy import cross_entropy_
from finetune.ops.limits import LOGITS_VALUES
from finetune.ops.matmul import has_fp32_result, matmul
from finetune.parallel.sharding import is_plain_linear, whole
from finetune.system.accelerator import on_gpu, table_key

# (logits [n, V], slice of the N rows, dtype) -> (sum of nats, fp32 scalar; gradient of the logits). Logits are fp32 or
# 16 bit. The loss computes in fp32 without autograd. It may overwrite the logits and return them as the gradient. The
# gradient is rounded to the dtype next: a loss that writes it elsewhere does well to return it so.
ChunkLoss = Callable[[Tensor, slice, torch.dtype], tuple[Tensor, Tensor]]


def chunked_loss(hidden_ND: Tensor, head: nn.Module, vocabulary: int, loss: ChunkLoss) -> Tensor:
    """Sum a loss over the logits of N rows: fp32, in nats, differentiable once.

    N = 0 gives 0 and gradients of 0, so that every parameter has a gradient on every rank.

    Args:
        hidden_ND: hidden states.
        head: output head. A frozen linear head costs two products of N * V * D. A trained one (LoRA, new tokens, a
            saved copy) runs as a module and also computes the gradients of its weights.
        vocabulary: V, the first rows of the head that are used.
        loss: the loss of a chunk.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    with whole(head):
        return _ChunkedLoss.apply(hidden_ND, head, vocabulary, loss, *trained)


def target_nats(hidden_ND: Tensor, head: nn.Module, vocabulary: int, labels_N: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target [N], fp32, in nats, differentiable once.

    The gradient of each row is kept until its factor is known, in backward: a frozen linear head costs no product
    more than `chunked_loss`. A trained head computes its logits again in backward, chunk by chunk.

    Args:
        hidden_ND: hidden states.
        head: output head.
        vocabulary: V, the first rows of the head that are used.
        labels_N: int64, each in [0, V).
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    with whole(head):
        return _TargetNats.apply(hidden_ND, head, vocabulary, labels_N, *trained)


@torch.no_grad()
def chunked_logits(hidden_ND: Tensor, head: nn.Module, vocabulary: int) -> Iterator[tuple[Tensor, slice]]:
    """Yield chunks of logits [n, V] and the slice of their rows; the next chunk overwrites the logits."""
    logits_NV = None
    with whole(head):
        for rows in _chunks(len(hidden_ND), vocabulary, hidden_ND.device, head):
            logits_NV = logits_of(hidden_ND[rows], head, vocabulary, logits_NV)
            yield logits_NV, rows


@torch.no_grad()
def logits_of(hidden_ND: Tensor, head: nn.Module, vocabulary: int, place_NV: Tensor | None = None) -> Tensor:
    """Return logits [n, V] that the caller may overwrite, in the buffer `place_NV` if it fits.

    Sums are fp32. A GPU returns fp32. On a CPU the result is rounded once to 16 bit, like in every PyTorch model:
    torch has no 16-bit product with an fp32 result there, and fp32 takes three times as long. The loss stays within
    2e-5 and the gradient within 0.4 % of float64. A sharded head must be `whole`.
    """
    plain = _as_plain(head)
    if plain is None:
        return head(hidden_ND)[:, :vocabulary]
    weight_VD, bias = plain.weight[:vocabulary], None if plain.bias is None else plain.bias[:vocabulary]
    widens = has_fp32_result(hidden_ND)
    if widens or (on_gpu(hidden_ND) and hidden_ND.dtype == torch.float32):
        rows = len(hidden_ND)
        whole_NV = None if place_NV is None else place_NV if place_NV._base is None else place_NV._base
        if whole_NV is None or len(whole_NV) < rows:
            # Chunks differ by one row at most: a spare row serves them all.
            whole_NV = torch.empty(rows + 1, len(weight_VD), dtype=torch.float32, device=hidden_ND.device)
        options = {"out_dtype": torch.float32} if widens else {}
        logits_NV = torch.mm(hidden_ND, weight_VD.t(), out=whole_NV[:rows], **options)
        return logits_NV if bias is None else logits_NV.add_(bias)
    fits = place_NV is not None and len(place_NV) == len(hidden_ND)
    return matmul(hidden_ND, weight_VD.t(), bias, place_NV if fits else None)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND: Tensor, head: nn.Module, vocabulary: int, loss: ChunkLoss, *trained: Tensor) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND)
        gradients = [torch.zeros_like(parameter) for parameter in trained]
        plain = None if trained else _as_plain(head)
        if plain is not None:
            for logits_NV, rows in chunked_logits(hidden_ND, plain, vocabulary):
                nats, dlogits_NV = loss(logits_NV, rows, hidden_ND.dtype)
                total += nats
                matmul(dlogits_NV.to(hidden_ND.dtype), plain.weight[:vocabulary], out_MN=gradient_ND[rows])
                del dlogits_NV  # before the next chunk makes its own
        else:
            # A trained copy of the head has fp32 weights and rounds the whole matrix at each read: cached, once.
            with parametrize.cached():
                for rows in _chunks(len(hidden_ND), vocabulary, hidden_ND.device, head):
                    with torch.enable_grad():
                        leaf_ND = hidden_ND[rows].detach().requires_grad_()
                        logits_NV = head(leaf_ND)[:, :vocabulary]
                    nats, dlogits_NV = loss(logits_NV.detach(), rows, logits_NV.dtype)
                    total += nats
                    gradient_ND[rows], *parts = torch.autograd.grad(
                        logits_NV, [leaf_ND, *trained], dlogits_NV.to(logits_NV.dtype), allow_unused=True
                    )
                    for gradient in gradients:
                        if (part := parts.pop(0)) is not None:
                            gradient += part
                        del part  # before the next chunk makes its own
        ctx.save_for_backward(gradient_ND, *gradients)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *trained = (gradient * grad_outputs[0].to(gradient.dtype) for gradient in ctx.saved_tensors)
        return hidden, None, None, None, *trained


class _TargetNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND: Tensor, head: nn.Module, vocabulary: int, labels_N: Tensor, *trained: Tensor) -> Tensor:
        ctx.head, ctx.vocabulary = head, vocabulary
        plain = None if trained else _as_plain(head)
        wanted = plain is not None and hidden_ND.requires_grad
        gradient_ND = torch.empty_like(hidden_ND) if wanted else None
        nats_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        for logits_NV, rows in chunked_logits(hidden_ND, head, vocabulary):
            nats_N[rows] = cross_entropy_(logits_NV, labels_N[rows])
            if gradient_ND is not None and plain is not None:
                matmul(logits_NV.to(hidden_ND.dtype), plain.weight[:vocabulary], out_MN=gradient_ND[rows])
        ctx.save_for_backward(hidden_ND, gradient_ND, labels_N)
        return nats_N

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, gradient_ND, labels_N = ctx.saved_tensors
        factors_N = grad_outputs[0]
        if gradient_ND is not None:
            return gradient_ND * factors_N.to(gradient_ND.dtype)[:, None], None, None, None

        def loss(logits_NV: Tensor, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            return (cross_entropy_(logits_NV, labels_N[rows], factors_N[rows]) * factors_N[rows]).sum(), logits_NV

        with torch.enable_grad():
            leaf_ND = hidden_ND.detach().requires_grad_()
            total = chunked_loss(leaf_ND, ctx.head, ctx.vocabulary, loss)
            trained = [parameter for parameter in ctx.head.parameters() if parameter.requires_grad]
            gradient, *parts = torch.autograd.grad(total, [leaf_ND, *trained])
        return gradient, None, None, None, *parts


def _as_plain(head: nn.Module) -> nn.Linear | None:
    """Return the head if it is a plain linear layer without hooks, so that the engine may compute its products."""
    return head if is_plain_linear(head) else None  # type: ignore[return-value]


def _chunks(rows: int, vocabulary: int, device: torch.device, head: nn.Module) -> Iterator[slice]:
    """Yield chunks of nearly equal length: a short last one would read the whole head for few rows."""
    # Gradient checkpointing sets the attribute.
    limit = getattr(head, "logits_values", None) or LOGITS_VALUES[table_key(device)]
    count = math.ceil(rows / max(1, limit // vocabulary))
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)
