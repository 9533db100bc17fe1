"""Bytes that a run holds before the first step, from the model's shapes and the config.

Source: Dettmers et al. 2023, arXiv:2305.14314 (4-bit blocks of 64 weights, 8-bit double quantisation in blocks of 256).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_BLOCK, _OUTER_BLOCK = 64, 256
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# fp32 value, gradient and AdamW's two moments.
_BYTES_PER_TRAINED = 16


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Static memory of one rank. parameters, trained: counts; the rest in bytes, activations not included."""

    parameters: int
    trained: int
    quantised_bytes: float
    unquantised_bytes: float
    adapter_bytes: int

    @property
    def total_bytes(self) -> float:
        return self.quantised_bytes + self.unquantised_bytes + self.adapter_bytes


def linear_shapes(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) features of each linear of one Qwen2 block."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    head = shape.get("head_dim") or hidden // heads
    kv = shape["num_key_value_heads"] * head
    inner = shape["intermediate_size"]
    return {
        "q_proj": (heads * head, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden),
        "o_proj": (hidden, heads * head),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip


def plan_memory(shape: Mapping[str, Any], model: ModelConfig, quant: QuantConfig, lora: LoraConfig) -> MemoryPlan:
    """Static bytes of a Qwen2 model of this shape (keys as in config.json), quantised and adapted as configured.

    `quant.keep`, patterns and `modules_to_save` are not counted.
    """
    linears, layers, hidden = linear_shapes(shape), shape["num_hidden_layers"], shape["hidden_size"]
    in_linears = layers * sum(out * inputs for out, inputs in linears.values())
    biases = layers * sum(linears[name][0] for name in ("q_proj", "k_proj", "v_proj"))
    norms = (2 * layers + 1) * hidden
    tables = shape["vocab_size"] * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    trained = _trained(linears, layers, lora)
    return MemoryPlan(
        parameters=in_linears + biases + norms + tables,
        trained=trained,
        quantised_bytes=in_linears * bytes_per_weight(quant, model),
        unquantised_bytes=(biases + norms + tables) * _DTYPE_BYTES[model.dtype],
        adapter_bytes=trained * _BYTES_PER_TRAINED,
    )


def bytes_per_weight(quant: QuantConfig, model: ModelConfig) -> float:
    """Storage of one weight of a linear, scales included."""
    if quant.type == "none":
        return _DTYPE_BYTES[model.dtype]
    if quant.type == "int8":
        return 1.0
    return 0.5 + (1 / _BLOCK + 4 / (_BLOCK * _OUTER_BLOCK) if quant.double else 4 / _BLOCK)


def _trained(linears: Mapping[str, tuple[int, int]], layers: int, lora: LoraConfig) -> int:
    return sum(
        lora.rank * sum(linears[name]) + (linears[name][0] if lora.dora else 0)
        for layer in range(layers)
        for name in adapted_linears(layer, lora)
    )


def adapted_linears(layer: int, lora: LoraConfig) -> frozenset[str]:
    """Names of the linears of one Qwen2 block that get an adapter."""
    if lora.layers_to_transform is not None and layer not in lora.layers_to_transform:
        return frozenset()
    return frozenset(name for name in LINEARS if _is_target(layer, name, lora.target_modules))


def _is_target(layer: int, name: str, targets: list[str] | str) -> bool:
    room = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    path = f"model.layers.{layer}.{room}.{name}"
    if isinstance(targets, list):
        return any(path == target or path.endswith(f".{target}") for target in targets)
    return targets == "all-linear" or re.fullmatch(targets, path) is not None
