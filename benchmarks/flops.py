"""Floating-point operations that the mathematics of a QLoRA step needs, whatever an implementation spends.

A weight of a frozen linear costs each token that goes through it 2 operations forward and 2 for the gradient with
respect to its input; there is no gradient with respect to the weight. Hence "4N". What is left out: the adapter's own
products (rank r costs 6 r (in + out) a token, 0.1 % of a layer at rank 8 on q and v), the elementwise parts,
quantization, recomputing. So whoever recomputes or dequantizes gets no credit for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.planning.static_memory import linear_shapes


def step_flops(
    shape: Mapping[str, Any], tokens: float, target_tokens: float, computed_tokens: float | None = None
) -> float:
    """4 operations a decoder weight for every token that has to be computed, 4 a head weight for every target.

    shape: keys of a config.json. tokens: those of the rows, padding excluded. target_tokens: those with a label; the
    head's output is needed nowhere else. computed_tokens: where documents of a micro-batch open with the same tokens,
    those are computed once: tokens less the copies; None means that nothing was shared.
    """
    layer = sum(out * inputs for out, inputs in linear_shapes(shape).values())
    decoder = shape["num_hidden_layers"] * layer
    head = shape["vocab_size"] * shape["hidden_size"]
    return 4.0 * (decoder * (tokens if computed_tokens is None else computed_tokens) + head * target_tokens)


def teacher_flops(shape: Mapping[str, Any], computed_tokens: float, target_tokens: float) -> float:
    """A teacher's forward pass of the same shape: 2 operations a decoder weight and computed token, 2 a head weight and
    target. `computed_tokens=0` is what the cached hidden states of a teacher cost.
    """
    return step_flops(shape, computed_tokens, target_tokens) / 2


def attention_flops(shape: Mapping[str, Any], tokens: float, square_mean_length: float) -> float:
    """Operations of causal attention itself: it grows with the square of a document's length.

    square_mean_length: sum of squared lengths over sum of lengths, in tokens: the length of the document in which a
    random token stands. Per layer and document of L tokens and head width times heads = d: two products of L * L * d
    forward and four backward, half of each under the causal mask: 2 L² d + 4 L² d.
    """
    heads = shape["num_attention_heads"]
    width = heads * (shape.get("head_dim") or shape["hidden_size"] // heads)
    return 6.0 * shape["num_hidden_layers"] * width * square_mean_length * tokens
