"""Count the floating-point operations that the mathematics of a QLoRA step needs.

A weight of a frozen linear layer costs 2 operations per token in the forward pass, and 2 for the gradient of its input.
It has no gradient of its own: "4N". Not counted: the adapter (rank r costs 6 r (in + out) per token, 0.1 % of a layer
at rank 8 on q and v), elementwise operations, quantization, recomputation. So an implementation gains no rate from
recomputing or dequantizing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.planning.static_memory import linear_shapes


def step_flops(
    shape: Mapping[str, Any], tokens: float, target_tokens: float, computed_tokens: float | None = None
) -> float:
    """Return 4 operations per decoder weight and computed token, and 4 per head weight and target.

    shape: keys of a config.json. tokens: without padding. target_tokens: tokens with a label, the only ones that need
    the head. computed_tokens: tokens without copies of prefixes that are computed once; None: nothing is shared.
    """
    layer = sum(out * inputs for out, inputs in linear_shapes(shape).values())
    decoder = shape["num_hidden_layers"] * layer
    head = shape["vocab_size"] * shape["hidden_size"]
    return 4.0 * (decoder * (tokens if computed_tokens is None else computed_tokens) + head * target_tokens)


def teacher_flops(shape: Mapping[str, Any], computed_tokens: float, target_tokens: float) -> float:
    """Return the operations of a teacher's forward pass: 2 per decoder weight and token, 2 per head weight and target.

    `computed_tokens=0` is the cost of a teacher's cached hidden states.
    """
    return step_flops(shape, computed_tokens, target_tokens) / 2


def attention_flops(shape: Mapping[str, Any], tokens: float, square_mean_length: float) -> float:
    """Return the operations of causal attention, which grow with the square of a document's length.

    square_mean_length: sum of squared lengths over sum of lengths, in tokens. A layer with d = heads x head width has
    two products of L * L * d forward and four backward for a document of L tokens. The causal mask halves them:
    2 L² d + 4 L² d.
    """
    heads = shape["num_attention_heads"]
    width = heads * (shape.get("head_dim") or shape["hidden_size"] // heads)
    return 6.0 * shape["num_hidden_layers"] * width * square_mean_length * tokens
