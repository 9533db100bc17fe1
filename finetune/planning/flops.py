"""Operations of a training step, and the seconds that a machine of known rates takes for them.

A product of a frozen linear costs 2 operations a weight and token forward and 2 for the gradient of its input; a layer
that is recomputed runs forward twice. What is not a product is counted in values that pass through memory.
Shapes: T tokens, D hidden width, I intermediate width, L a document's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.schema import RunConfig
from finetune.planning.activations import first_reached
from finetune.planning.static_memory import (
    adapted_linears,
    layer_precisions,
    linear_shapes,
    module_path,
    rank_of,
    static_of,
)
from finetune.planning.teacher import teacher_shape


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one optimizer step of one rank has to do.

    products: floating-point operations by the linear they belong to, the head's among them; recomputing included.
    adapters: of LoRA's own products. attention: of causal attention. elementwise: values [T, I] that a layer's
    elementwise steps pass over, forward and backward. dequantized: 4-bit weights turned into 16 bit, by their linear.
    logits: values whose softmax is taken. trained: values that the optimizer moves. rows: tokens of one forward pass.
    """

    products: Mapping[str, float]
    adapters: float
    attention: float
    elementwise: float
    dequantized: Mapping[str, float]
    logits: float
    trained: int
    rows: int

    @property
    def flops(self) -> float:
        return sum(self.products.values()) + self.adapters + self.attention


def layer_passes(work: StepWork, shape: Mapping[str, Any]) -> float:
    """How often a step runs a layer forward or backward."""
    return work.elementwise / (work.rows * shape["intermediate_size"])


def step_work(
    cfg: RunConfig,
    shape: Mapping[str, Any],
    micro_batch: int,
    recomputed: int,
    *,
    ranks: int = 1,
    document_tokens: int | None = None,
    target_share: float = 1.0,
) -> StepWork:
    """The work of a step of full sequences. target_share: of the tokens that carry a target."""
    sequences = math.ceil(cfg.train.batch_size / ranks)
    passes, tokens = math.ceil(sequences / micro_batch), sequences * cfg.data.max_length
    layers, linears = shape["num_hidden_layers"], linear_shapes(shape)
    adapted = [adapted_linears(layer, cfg.lora) for layer in range(layers)]
    first = first_reached(adapted, cfg)
    products, dequantized, adapters = dict.fromkeys(linears, 0.0), dict.fromkeys(linears, 0.0), 0.0
    for layer in range(layers):
        # Forward, forward again, and the gradient of the input, which nothing below the first trained weight needs.
        forward = 2 if first <= layer < first + recomputed else 1
        backward = 1 if layer >= first else 0
        for name, precision in layer_precisions(layer, cfg.model, cfg.quant).items():
            weights = math.prod(linears[name])
            # A recomputed layer's work ends with the last tensor that backward needs (models/recompute.py).
            again = 1 if name == "down_proj" and name not in adapted[layer] else forward
            reached = backward and not (layer == first and name in ("q_proj", "k_proj", "v_proj"))
            runs = again + (1 if reached else 0)
            products[name] += 2.0 * weights * tokens * runs
            if precision == "nf4" and not cfg.quant.keep_dequantized:
                dequantized[name] += weights * passes * runs
            if name in adapted[layer]:
                rank = rank_of(module_path(layer, name), cfg.lora)
                adapters += 2.0 * rank * sum(linears[name]) * tokens * (forward + 2)
    targets = target_share * tokens
    table = shape["vocab_size"] * shape["hidden_size"]
    products["head"] = 4.0 * table * targets
    run_twice = layers - first + recomputed
    document = document_tokens or cfg.data.max_length
    work = StepWork(
        products,
        adapters,
        _attention(shape, tokens, document, layers, first, recomputed),
        float(tokens * shape["intermediate_size"] * (layers + run_twice)),
        dequantized,
        targets * shape["vocab_size"],
        static_of(cfg, shape).trained,
        micro_batch * cfg.data.max_length,
    )
    return _with_teacher(cfg, shape, work, tokens, targets, document_tokens)


def _attention(shape: Mapping[str, Any], tokens: int, document: int, layers: int, first: int, again: int) -> float:
    """2 L^2 d forward and 4 L^2 d backward for a document, under the causal mask; d = heads times head width."""
    width = linear_shapes(shape)["q_proj"][0]
    return 2.0 * width * document * tokens * (layers + again + 2 * (layers - first))


def _with_teacher(
    cfg: RunConfig, shape: Mapping[str, Any], work: StepWork, tokens: int, targets: float, document: int | None
) -> StepWork:
    """A teacher of the student's shape runs forward once; another's work is scaled by its weights."""
    if cfg.distill.objective == "none" or cfg.distill.teacher.placement in ("cached", "server"):
        return work
    taught = teacher_shape(cfg, shape)
    if taught is None:
        return work
    products = dict(work.products)
    for name, (out, inputs) in linear_shapes(taught).items():
        products[name] += 2.0 * out * inputs * tokens * taught["num_hidden_layers"]
    products["head"] += 2.0 * taught["vocab_size"] * taught["hidden_size"] * targets
    layers = taught["num_hidden_layers"]
    attention = _attention(taught, tokens, document or cfg.data.max_length, layers, layers, 0)
    return StepWork(
        products,
        work.adapters,
        work.attention + attention,
        work.elementwise + tokens * taught["intermediate_size"] * layers,
        work.dequantized,
        2 * work.logits,
        work.trained,
        work.rows,
    )
