"""Cross-entropy over target tokens, without logits for the tokens that carry no target.

Shapes: T tokens of a packed batch, N of them with a target, D hidden width, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from finetune.data.batch import Batch
from finetune.data.template.chat import UNTRAINED
from finetune.ops.attention import SEGMENTED, plan_segments

# Rows of logits alive at once: 2**26 fp32 values are 256 MB.
_LOGITS_LIMIT = 2**26


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the target tokens of a batch, in fp32 on the model's device: nats, tokens predicted right, tokens."""

    nll: Tensor
    correct: Tensor
    tokens: int


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model; a transformers model itself. Adapter layers stay where they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value]


def head_of(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits, with whatever adapter it carries."""
    head = base_of(model).get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(base_of(model)).__name__} has no output head, so it has no language-model loss")
    return head


def hidden_states(model: nn.Module, batch: Batch, neftune_alpha: float = 0.0) -> Tensor:
    """Final normed hidden states [T, D] of a packed batch, each document attending to itself alone.

    neftune_alpha: uniform noise on the embeddings, scaled by alpha / sqrt(document length * D); only in training mode.
    Source: Jain et al. 2023, arXiv:2310.05914.
    """
    base = base_of(model)
    embeddings = base.get_input_embeddings()(batch.input_ids)
    if neftune_alpha and model.training:
        lengths = torch.tensor(batch.segment_lengths, device=embeddings.device)
        bound_T = neftune_alpha / (lengths * embeddings.shape[-1]).float().sqrt().repeat_interleave(lengths)
        noise = torch.rand_like(embeddings, dtype=torch.float32).mul_(2).sub_(1) * bound_T[None, :, None]
        embeddings = embeddings + noise.to(embeddings.dtype)
    if base.config._attn_implementation == SEGMENTED:
        # A mapping is taken as masks already made, so transformers builds no dense block mask.
        segments = plan_segments(batch.segment_lengths, embeddings.device)
        isolation = {"attention_mask": {"full_attention": None}, "segments": segments}
    else:
        isolation = {}  # transformers finds the borders where positions restart
    backbone = getattr(base, base.base_model_prefix)
    outputs = backbone(inputs_embeds=embeddings, position_ids=batch.position_ids, use_cache=False, **isolation)
    return outputs.last_hidden_state[0]


def _chunk_nll(head: nn.Module, hidden_ND: Tensor, labels_N: Tensor, weights_N: Tensor | None) -> Tensor:
    logits_NV = head(hidden_ND).float()
    if weights_N is None:
        return F.cross_entropy(logits_NV, labels_N, reduction="sum")
    return (F.cross_entropy(logits_NV, labels_N, reduction="none") * weights_N).sum()


# Hidden states [N, D], labels [N] and loss weights [N] (None: 1 everywhere) of some rows that carry a target.
_Chunk = tuple[Tensor, Tensor, Tensor | None]


def _target_chunks(hidden_TD: Tensor, batch: Batch, vocabulary: int) -> tuple[Tensor, list[_Chunk]]:
    """The hidden states [N, D] that carry a target, and the same in chunks of bounded logits."""
    labels_T = batch.labels[0]
    rows = (labels_T != UNTRAINED).nonzero().squeeze(1)
    rows_ND, labels_N = hidden_TD[rows], labels_T[rows]
    if not len(rows):
        return rows_ND, []
    size = max(1, _LOGITS_LIMIT // vocabulary)
    states, labels = rows_ND.split(size), labels_N.split(size)
    weights = [None] * len(states) if batch.weights is None else batch.weights[0][rows].split(size)
    return rows_ND, list(zip(states, labels, weights, strict=True))


class _FrozenHeadNll(torch.autograd.Function):
    """Sum of nats whose gradient with respect to the hidden states is made in the forward pass.

    A chunk's logits die before the next chunk's are made, and none is made twice. Only for a head without trained
    parameters: their gradients would be lost.
    """

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, head: nn.Module, chunks: list[_Chunk]) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        gradients = []
        for chunk_ND, labels_N, weights_N in chunks:
            with torch.enable_grad():
                leaf_ND = chunk_ND.detach().requires_grad_()
                nll = _chunk_nll(head, leaf_ND, labels_N, weights_N)
            gradients += torch.autograd.grad(nll, leaf_ND)
            total += nll.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * grad_outputs[0].to(gradient_ND.dtype), None, None


class CrossEntropy(nn.Module):
    """The training loss as a module, so that DDP can wrap model and loss in one.

    forward(batch) returns the summed negative log-likelihood over the batch's targets, each times its weight, fp32, in
    nats; the caller divides by the global count of targets. It is differentiable also for a batch without a target (it
    is 0 then).
    """

    def __init__(self, model: nn.Module, neftune_alpha: float = 0.0):
        super().__init__()
        self.model = model
        self.neftune_alpha = neftune_alpha

    def forward(self, batch: Batch) -> Tensor:
        hidden_TD = hidden_states(self.model, batch, self.neftune_alpha)
        head = head_of(self.model)
        rows_ND, chunks = _target_chunks(hidden_TD, batch, base_of(self.model).config.vocab_size)
        if not chunks:
            # Keeps every adapter in the graph: DDP waits for each of them.
            return hidden_TD.float().sum() * 0.0
        if any(parameter.requires_grad for parameter in head.parameters()):
            parts = [checkpoint(_chunk_nll, head, *chunk, use_reentrant=False) for chunk in chunks]
            return torch.stack(parts).sum()
        return _FrozenHeadNll.apply(rows_ND, head, chunks)


@torch.no_grad()
def score(model: nn.Module, batch: Batch) -> Score:
    """Negative log-likelihood and correct predictions over a batch's targets, unweighted, without gradients."""
    hidden_TD = hidden_states(model, batch)
    head = head_of(model)
    nll = hidden_TD.new_zeros((), dtype=torch.float32)
    correct = hidden_TD.new_zeros((), dtype=torch.float32)
    tokens = 0
    _, chunks = _target_chunks(hidden_TD, batch, base_of(model).config.vocab_size)
    for hidden_ND, labels_N, _ in chunks:
        logits_NV = head(hidden_ND).float()
        nll += F.cross_entropy(logits_NV, labels_N, reduction="sum")
        correct += (logits_NV.argmax(-1) == labels_N).sum()
        tokens += len(labels_N)
    return Score(nll, correct, tokens)
