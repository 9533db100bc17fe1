"""Operations of a training step.

A product of a frozen linear costs 2 operations per weight and token forward, and 2 for the gradient of its input. A
recomputed layer runs forward twice. Everything but products is counted in values that pass through memory.

Names: T tokens, D hidden width, I intermediate width, L tokens of a document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.planning.inputs import PlanInputs
from finetune.planning.static_memory import layer_precisions, linear_shapes, rank_of
from finetune.planning.towers import TowerWork, step_passes


@dataclass(frozen=True, slots=True)
class StepWork:
    """Work of one optimizer step on one rank.

    products: floating-point operations per linear and of the head, recomputing included.
    adapters: operations of LoRA's own products. attention: operations of causal attention.
    elementwise: values [T, I] that elementwise steps of layers process, forward and backward.
    dequantized: 4-bit weights converted to 16 bit, per linear. logits: values of softmax.
    trained: values that the optimizer updates. rows: tokens per forward pass.
    towers: passes of towers that run in each step.
    """

    products: Mapping[str, float]
    adapters: float
    attention: float
    elementwise: float
    dequantized: Mapping[str, float]
    logits: float
    trained: int
    rows: int
    towers: Sequence[TowerWork] = ()

    @property
    def flops(self) -> float:
        towers = sum(work.flops for work in self.towers)
        return sum(self.products.values()) + self.adapters + self.attention + towers

    def layer_passes(self, inner: int) -> float:
        """Return how often a step runs a layer forward or backward. inner: I."""
        return self.elementwise / (self.rows * inner)


def step_work(inputs: PlanInputs, micro_batch: int, recomputed: int) -> StepWork:
    """Compute the work of a step of full sequences.

    Args:
        micro_batch: sequences per forward pass.
        recomputed: layers with gradient checkpointing.
    """
    sequences, sequence, shape, linears = inputs.step_sequences, inputs.sequence, inputs.shape, inputs.linears
    passes, tokens = math.ceil(sequences / micro_batch), sequences * sequence.rows
    layers, first = len(inputs.adapted), inputs.first_trained_layer
    products, dequantized, adapters = dict.fromkeys(linears, 0.0), dict.fromkeys(linears, 0.0), 0.0
    for layer in range(layers):
        forward = 2 if first <= layer < first + recomputed else 1
        for name, precision in layer_precisions(inputs.family, layer, inputs.model, inputs.quant).items():
            weights, adapted = math.prod(linears[name]), name in inputs.adapted[layer]
            # Recomputing ends with the last tensor that backward needs (models/gradient_checkpointing.py).
            runs = 1 if name == "down_proj" and not adapted else forward
            # Nothing below the first trained weight needs the gradient of an input.
            if layer > first or (layer == first and name not in ("q_proj", "k_proj", "v_proj")):
                runs += 1
            products[name] += 2.0 * weights * tokens * runs
            if precision == "nf4" and not inputs.quant.keep_dequantized:
                dequantized[name] += weights * passes * runs
            if adapted:
                rank = rank_of(inputs.family.linear_path(layer, name), inputs.lora)
                out, size = linears[name]
                backward = 2 * out + (1 if inputs.lora.freeze_a else 2) * size
                adapters += 2.0 * rank * tokens * ((out + size) * forward + backward)
    targets = sequences * sequence.targets
    products["head"] = 4.0 * (shape["vocab_size"] * shape["hidden_size"]) * targets
    forward_passes, backward_passes = layers + recomputed, layers - first
    rows = micro_batch * sequence.rows
    attention = _attention(inputs, shape, forward_passes + 2 * backward_passes)
    elementwise = float(tokens * shape["intermediate_size"] * (forward_passes + backward_passes))
    logits, trained = targets * shape["vocab_size"], inputs.static.trained
    towers = step_passes(inputs)
    work = StepWork(products, adapters, attention, elementwise, dequantized, logits, trained, rows, towers)
    return _with_teacher(inputs, work, tokens, targets)


def _attention(inputs: PlanInputs, shape: Mapping[str, Any], passes: int) -> float:
    """2 L^2 d forward and 4 L^2 d backward per document, under the causal mask; d = heads times head width."""
    sequence = inputs.sequence
    places = inputs.step_sequences * sequence.places
    return 2.0 * linear_shapes(shape)["q_proj"][0] * sequence.document * places * passes


def _with_teacher(inputs: PlanInputs, work: StepWork, tokens: float, targets: float) -> StepWork:
    """Add the forward pass of a teacher or of a reference policy that runs in this process."""
    if inputs.runs_reference:
        passes, layers = math.ceil(tokens / work.rows), len(inputs.adapted)
        dequantized = {
            name: weights and weights + math.prod(inputs.linears[name]) * passes * layers
            for name, weights in work.dequantized.items()
        }
        return _with_forward(inputs, replace(work, dequantized=dequantized), inputs.shape, tokens, targets)
    shape = inputs.teacher_shape
    placement = inputs.distill.teacher.placement
    if inputs.distill.objective == "none" or placement in ("cached", "server") or shape is None:
        return work
    return _with_forward(inputs, work, shape, tokens, targets)


def _with_forward(
    inputs: PlanInputs, work: StepWork, shape: Mapping[str, Any], tokens: float, targets: float
) -> StepWork:
    products, layers = dict(work.products), shape["num_hidden_layers"]
    for name, (out, size) in linear_shapes(shape).items():
        products[name] += 2.0 * out * size * tokens * layers
    products["head"] += 2.0 * shape["vocab_size"] * shape["hidden_size"] * targets
    return replace(
        work,
        products=products,
        attention=work.attention + _attention(inputs, shape, layers),
        elementwise=work.elementwise + tokens * shape["intermediate_size"] * layers,
        logits=2 * work.logits,
    )
