"""Memory that does not depend on the batch: the base per precision, trained values, gradients, the optimizer.

Source: Dettmers et al. 2023, arXiv:2305.14314 (4-bit blocks of 64 weights, 8-bit double quantization in blocks of 256).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.models.families import FAMILIES, ModelFamily
from finetune.models.families.family import LINEARS
from finetune.models.module_matching import ends_with, matches, matches_key
from finetune.models.quant.bit_widths import DTYPE_BYTES
from finetune.planning.tower_shapes import TowerShape, tower_shapes

_BLOCK, _OUTER_BLOCK = 64, 256
# 8-bit moments have a fp32 scale for each block of 256. Paged moments are counted as if they stayed on the GPU.
# Lion has one moment.
_MOMENTS = {"adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}
_MOMENTS |= {"lion": 4.0, "lion_8bit": 1 + 4 / 256}


@dataclass(frozen=True, slots=True)
class StaticMemory:
    """Static memory of one rank. parameters, trained: counts. parts: bytes per purpose, none of them 0."""

    parameters: int
    trained: int
    parts: Mapping[str, float]

    @property
    def total_bytes(self) -> float:
        return sum(self.parts.values())


def head_dim_of(shape: Mapping[str, Any]) -> int:
    """Return the width of a head. shape: keys as in config.json."""
    return shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]  # Most files leave it out.


def linear_shapes(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the (out, in) features of each linear of a decoder layer. shape: keys as in config.json."""
    hidden, heads, head = shape["hidden_size"], shape["num_attention_heads"], head_dim_of(shape)
    kv = shape["num_key_value_heads"] * head
    inner = shape["intermediate_size"]
    return {
        "q_proj": (heads * head, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, heads * head),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def plan_memory(
    shape: Mapping[str, Any],
    model: ModelConfig,
    quant: QuantConfig,
    lora: LoraConfig,
    optimizer: str = "adamw",
    *,
    shard_ranks: int = 1,
) -> StaticMemory:
    """Compute the static memory of a model on one rank, without the weights of towers.

    shape: keys as in config.json. optimizer: of TrainConfig. shard_ranks: ranks that hold one copy of the base.
    """
    width, tied, trained = DTYPE_BYTES[model.dtype], shape.get("tie_word_embeddings"), trained_parameters(shape, lora)
    table_bytes = shape["vocab_size"] * shape["hidden_size"] * width / shard_ranks
    vectors = shape["num_hidden_layers"] * sum(_vectors(shape).values()) / shard_ranks + shape["hidden_size"]
    parts = _base_parts(shape, model, quant, shard_ranks) | {
        "embedding and head (tied)" if tied else "embedding": table_bytes,
        "head": 0 if tied else table_bytes,
        "norms and biases": vectors * width,
        "adapter": trained_parameters(shape, lora, with_frozen=True) * 4,  # fp32, as the gradients
        "gradients": trained * 4,
        "optimizer": trained * _MOMENTS[optimizer],
    }
    parameters = parameters_of(shape) + sum(tower.parameters for tower in tower_shapes(shape).values())
    return StaticMemory(parameters, trained, {name: float(size) for name, size in parts.items() if size})


def parameters_of(shape: Mapping[str, Any]) -> int:
    """Count the parameters of a decoder and its head, a tied table once."""
    hidden, tables = shape["hidden_size"], 1 if shape.get("tie_word_embeddings") else 2
    layer = sum(out * inputs for out, inputs in linear_shapes(shape).values()) + sum(_vectors(shape).values())
    return shape["num_hidden_layers"] * layer + hidden + tables * shape["vocab_size"] * hidden


def _vectors(shape: Mapping[str, Any]) -> dict[str, int]:
    """Return the values of a layer's norms, by their name in the layer, and of its biases, by that of their linear."""
    family, linears, hidden = FAMILIES[shape["model_type"]], linear_shapes(shape), shape["hidden_size"]
    vectors = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if family.head_norms:
        vectors |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), head_dim_of(shape))
    return vectors | {name: linears[name][0] for name in family.biased}


def gathered_layer_bytes(
    shape: Mapping[str, Any], model: ModelConfig, quant: QuantConfig, shard_ranks: int
) -> list[int]:
    """Return the bytes of each decoder layer that ranks gather from one another where the base is sharded.

    Those are all its frozen tensors but the second-level scales of 4-bit blocks, which every rank holds whole. A tensor
    is split by its rows, and the last parts are padded.
    """
    linears, width = linear_shapes(shape), DTYPE_BYTES[model.dtype]
    vectors = [(size, width) for size in _vectors(shape).values()]
    sizes = []
    for layer in range(shape["num_hidden_layers"]):
        tensors = list(vectors)
        for name, kind in layer_precisions(FAMILIES[shape["model_type"]], layer, model, quant).items():
            out, inputs = linears[name]
            if kind == "nf4":  # two codes in a byte, and a scale for each block
                blocks = math.ceil(out * inputs / _BLOCK)
                tensors += [(math.ceil(out * inputs / 2), 1), (blocks, 1 if quant.double else 4)]
            else:
                tensors.append((out, inputs * DTYPE_BYTES[kind]))
        sizes.append(sum(padded_bytes(rows, size, shard_ranks) for rows, size in tensors))
    return sizes


def padded_bytes(rows: int, row_bytes: int, shard_ranks: int) -> int:
    """Return the bytes of a tensor whose ranks hold parts of equally many rows."""
    return math.ceil(rows / shard_ranks) * shard_ranks * row_bytes


def _base_parts(shape: Mapping[str, Any], model: ModelConfig, quant: QuantConfig, shard_ranks: int) -> dict[str, float]:
    """Bytes of the linears per precision, and of the 16-bit copies that `quant.keep_dequantized` keeps."""
    parts: dict[str, float] = {}
    linears, family = linear_shapes(shape), FAMILIES[shape["model_type"]]
    for layer in range(shape["num_hidden_layers"]):
        for name, precision in layer_precisions(family, layer, model, quant).items():
            weights, key = math.prod(linears[name]), f"linears in {precision}"
            sharded = _sharded_bytes(precision, quant)
            whole = bytes_per_weight(precision, quant) - sharded
            parts[key] = parts.get(key, 0.0) + weights * (sharded / shard_ranks + whole)
            if precision == "int8":
                parts[key] += 4 * linears[name][0]  # one scale per row
            if quant.keep_dequantized and precision == "nf4":
                copies = "16-bit copies of 4-bit linears"
                parts[copies] = parts.get(copies, 0.0) + weights * DTYPE_BYTES[quant.compute_dtype]
    return parts


def layer_precisions(family: ModelFamily, layer: int, model: ModelConfig, quant: QuantConfig) -> dict[str, str]:
    """Return how each linear of a layer is stored: nf4, int8, or the model's own dtype."""

    def precision_of(path: str) -> str:
        if quant.type == "none" or any(matches(pattern, path) for pattern in quant.skip_modules):
            return model.dtype
        return "int8" if any(matches(pattern, path) for pattern in quant.int8) else quant.type

    if not (quant.skip_modules or quant.int8):  # A plan of a table asks for thousands of layers.
        return dict.fromkeys(LINEARS, model.dtype if quant.type == "none" else quant.type)
    return {name: precision_of(family.linear_path(layer, name)) for name in LINEARS}


def bytes_per_weight(precision: str, quant: QuantConfig) -> float:
    """Return the stored bytes per weight of a linear, with the scales of 4-bit blocks."""
    if precision in DTYPE_BYTES:
        return DTYPE_BYTES[precision]
    if precision == "int8":
        return 1.0
    return 0.5 + (1 / _BLOCK + 4 / (_BLOCK * _OUTER_BLOCK) if quant.double else 4 / _BLOCK)


def _sharded_bytes(precision: str, quant: QuantConfig) -> float:
    """Return the bytes per weight of a linear that a sharded base splits: all but second-level scales."""
    second_level = 4 / (_BLOCK * _OUTER_BLOCK) if precision == "nf4" and quant.double else 0.0
    return bytes_per_weight(precision, quant) - second_level


def trained_parameters(shape: Mapping[str, Any], lora: LoraConfig, *, with_frozen: bool = False) -> int:
    """Values that training moves: factors, DoRA's magnitudes, modules trained in full, rows of new tokens.

    with_frozen: count A where `lora.freeze_a` freezes it.
    """
    linears, family, total = linear_shapes(shape), FAMILIES[shape["model_type"]], 0
    for layer in range(shape["num_hidden_layers"]):
        for name in adapted_linears(family, layer, lora):
            rank = rank_of(family.linear_path(layer, name), lora)
            total += _factor_values(linears[name], rank, lora, with_frozen)
    total += sum(trained_in_tower(tower, lora, with_frozen=with_frozen) for tower in tower_shapes(shape).values())
    tables = 1 if shape.get("tie_word_embeddings") else 2
    total += len(lora.new_tokens) * shape["hidden_size"] * tables
    saved = lora.modules_to_save
    return total + sum(size for path, size in _modules(shape) if any(ends_with(path, wanted) for wanted in saved))


def _factor_values(size: tuple[int, int], rank: int, lora: LoraConfig, with_frozen: bool) -> int:
    """Count the trained values of an adapter on a linear with (out, in) features."""
    out, inputs = size
    return rank * (out if lora.freeze_a and not with_frozen else out + inputs) + (out if lora.dora else 0)


def trained_in_tower(tower: TowerShape, lora: LoraConfig, *, with_frozen: bool = False) -> int:
    """Return the values of a tower's adapter; 0 if `lora.towers` does not name the tower."""
    if tower.name not in lora.towers:
        return 0
    total = 0
    for layer in range(tower.layers):
        for name, size in tower.linears.items():
            total += _factor_values(size, rank_of(f"{tower.blocks}.{layer}.{name}", lora), lora, with_frozen)
    return total


def _modules(shape: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the full name and the number of values of every module with weights."""
    family, vectors, hidden = FAMILIES[shape["model_type"]], _vectors(shape), shape["hidden_size"]
    table = shape["vocab_size"] * hidden
    yield from ((family.embedding, table), (family.head, table), (family.final_norm, hidden))
    for layer in range(shape["num_hidden_layers"]):
        yield from ((f"{family.layer_name(layer)}.{name}", vectors[name]) for name in vectors.keys() - LINEARS)
        for name, (out, inputs) in linear_shapes(shape).items():
            yield family.linear_path(layer, name), out * inputs + vectors.get(name, 0)


def module_names(shape: Mapping[str, Any]) -> set[str]:
    """Return the full names of all modules of a decoder and its head with weights, and of the modules around them."""
    parts = [path.split(".") for path, _ in _modules(shape)]
    return {".".join(steps[:count]) for steps in parts for count in range(1, len(steps) + 1)}


def rank_of(path: str, lora: LoraConfig) -> int:
    """Return the adapter's rank on a module: the first match in `lora.rank_pattern`, else `lora.rank`."""
    return next((rank for key, rank in lora.rank_pattern.items() if matches_key(key, path)), lora.rank)


def adapted_linears(family: ModelFamily, layer: int, lora: LoraConfig) -> frozenset[str]:
    """Return the names of the linears of a decoder layer that get an adapter."""
    if lora.layers_to_transform is not None and layer not in lora.layers_to_transform:
        return frozenset()
    targets = lora.target_modules
    paths = tuple(family.linear_path(layer, name) for name in LINEARS)
    return _targets_in(paths, targets if isinstance(targets, str) else tuple(targets))


@functools.cache
def _targets_in(paths: tuple[str, ...], targets: tuple[str, ...] | str) -> frozenset[str]:
    named = dict(zip(LINEARS, paths, strict=True))
    if isinstance(targets, tuple):
        return frozenset(n for n, path in named.items() if any(ends_with(path, target) for target in targets))
    return frozenset(n for n, path in named.items() if targets == "all-linear" or re.fullmatch(targets, path))
