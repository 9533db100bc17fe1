"""Temporaries of a decoder layer on a GPU, from the tensors that are alive at once.

`tests/cuda_trace` compares the predictions with a trace of the code.
Names: D hidden width, I intermediate width, H query heads, W head width, T tokens.
"""

from __future__ import annotations

import math

from finetune.ops import limits
from finetune.planning.inputs import PlanInputs
from finetune.planning.static_memory import DTYPE_BYTES

# Bytes of a block of an elementwise kernel that runs as plain torch (swiglu_backward_): eight fp32 values (gate, up,
# gradient, sigmoid, four products) and the 16-bit gradient.
_PLAIN_BYTES = 34
_MLP = ("gate_proj", "up_proj", "down_proj")


def tile_rows(inputs: PlanInputs, tokens: int) -> int | None:
    """Return the rows per tile of a checkpointed layer's MLP; None if it runs on all rows at once."""
    lora, quant = inputs.lora, inputs.quant
    adapted = any(name in names for names in inputs.adapted for name in _MLP)
    if (
        inputs.train.kernels == "peft"
        or quant.type == "int8"
        or quant.int8
        or (adapted and (lora.dora or lora.dropout))
    ):
        return None
    least = limits.MLP_TILE_ROWS["offload" if inputs.train.gradient_checkpointing == "offload" else "all"]
    return min(tokens, max(least, min(tokens // limits.MLP_TILES, limits.MLP_MOST_TILE_ROWS)))


def tiles_last_layer(inputs: PlanInputs) -> bool:
    """Return whether the last layer, which is not recomputed, runs its MLP in tiles."""
    return inputs.train.gradient_checkpointing in ("all", "offload")


def weight_buffer_bytes(inputs: PlanInputs) -> float:
    """Return the bytes of the buffer into which the kernels dequantize each matrix (ops/dequantize.py)."""
    if inputs.quant.type != "nf4" or inputs.quant.keep_dequantized or inputs.train.kernels == "peft":
        return 0.0
    return max(out * size for out, size in inputs.linears.values()) * DTYPE_BYTES[inputs.quant.compute_dtype]


def layer_work(inputs: PlanInputs, tokens: int, *, compiled: bool, tiled: bool) -> float:
    """Return the largest temporaries of a layer's backward pass, beyond what the layer keeps."""
    width, inner, hidden = inputs.value_bytes, inputs.shape["intermediate_size"], inputs.shape["hidden_size"]
    rows = tile_rows(inputs, tokens) if tiled else None
    if inputs.train.kernels == "peft":
        # Gradients of product, gate and up, the product of silu, and a dequantized matrix.
        largest = max(out * size for out, size in inputs.linears.values())
        mlp = 4 * tokens * inner * width + (largest * width if inputs.quant.type == "nf4" else 0)
    elif rows is None:
        mlp = tokens * inner * width  # the gradient of the product; those of gate and up overwrite them
    else:
        mlp = 3 * rows * inner * width  # gate, up and the gradient of the product; of a tile
    # The gradients of the layer's output and of the MLP's input; a whole MLP makes the latter in two parts.
    mlp += (3 if rows is None else 2) * tokens * hidden * width
    # When attention runs backward, the input of the second norm is free, and gate and up, or the input of a tiled MLP.
    free = tokens * (hidden + (2 * inner if rows is None else hidden)) * width
    attention = _attention_work(inputs, tokens) - free
    plain = 0 if compiled else _PLAIN_BYTES * min(tokens * inner, limits.PLAIN_BLOCK_VALUES)
    return max(mlp, attention) + plain


def _attention_work(inputs: PlanInputs, tokens: int) -> float:
    """Gradients of residual, output, queries, keys and values, and the workspace of flash attention.

    It sums gradients of queries in fp32, and makes those of keys and values for every query head. A deterministic one
    divides the keys among all multiprocessors and has a sum for each part.
    """
    width, heads, places = inputs.value_bytes, inputs.shape["num_attention_heads"], tokens * inputs.places_of_a_row
    queries, keys = inputs.linears["q_proj"][0], inputs.linears["k_proj"][0]
    gradients = tokens * inputs.shape["hidden_size"] * width + places * (2 * queries + 2 * keys) * width
    if places > tokens:
        gradients += tokens * queries * width  # that of the output, per row
    if not inputs.flash_attention:
        return gradients + places * _grouped_attention_work(inputs)
    documents = max(1, places // inputs.sequence.document)
    sums = math.ceil(inputs.gpu.multiprocessors / (documents * heads)) if inputs.train.deterministic else 1
    workspace = sums * 4 * queries + 4 * heads + (2 * queries * width if keys < queries else 0)
    return gradients + places * workspace


def _grouped_attention_work(inputs: PlanInputs) -> float:
    """Bytes per token of the memory-efficient kernel's backward pass, with keys and values for every query head.

    It gives gradients of repeated keys and values, and sums those of queries in fp32. In bf16, a second forward pass
    comes first: a copy of the queries in fp32, repeated keys and values, the output, its gradient; then the gradients.
    """
    queries = inputs.linears["q_proj"][0]
    if inputs.attention_in_fp32:
        return 4 * (queries + 2 * queries + queries + queries + 3 * queries)
    return 2 * queries * inputs.value_bytes + 4 * queries
