"""Bytes that a forward and backward pass holds besides the model, and how many layers to recompute so that it fits.

Arithmetic on shapes and config alone. Tests hold what a kept layer holds to what autograd saves.

Shapes: D hidden width, I intermediate width, H query heads, K key-value heads, W head width, L a document's tokens;
s bytes of a value in the compute type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.schema import RunConfig
from finetune.planning.memory import adapted_linears, linear_shapes

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Linears that a kernel computes together; if it does not know one of them, none.
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
_ROOMS = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"o_proj"}), _MLP)
# Values of logits alive at once (losses/chunked.py), and bytes of each: as multiplied, in fp32, their gradient.
_LOGITS = {"cuda": (2**26, 10), "cpu": (2**25, 8)}
# ops/attention.py: a CPU's lengths are rounded up to a multiple, and shorter documents keep no output.
_ROUNDING, _FUSED_BACKWARD_FROM = 32, 513
# Bytes alive a value of [T, I] while the MLP's backward pass runs: fp32 copies, unless one compiled pass makes it all.
_MLP_WORK = {"compiled": 4, "plain torch": 36}


@dataclass(frozen=True, slots=True)
class ActivationPlan:
    """Bytes of one micro-batch on one rank, by what they are for.

    kept: what each layer that backward reaches holds when it is not recomputed, from the lowest of them on. input: what
    a recomputed one holds. first: number of the lowest one. head: the loss's work, when all of that is alive.
    work: temporaries of a layer's backward pass, the dequantised weight among them. layers: all of the model's.
    """

    kept: tuple[float, ...]
    input: float
    first: int
    head: float
    work: float
    layers: int

    def peak_bytes(self, recomputed: int, offload: bool = False) -> float:
        """The most that is alive at once when the first `recomputed` of the layers in `kept` are recomputed.

        Either at the loss, or while the first layer of backward or the topmost recomputed one is at work. offload: of
        the inputs in main memory two are on the device, one in use and one on its way.
        """
        inputs = min(recomputed, 2 if offload else recomputed) * self.input
        whole = inputs + sum(self.kept[recomputed:]) + max(self.head, self.work)
        again = inputs + self.kept[recomputed - 1] + self.work if recomputed else 0.0
        return max(whole, again)

    def fewest(self, budget_bytes: float) -> int:
        """The smallest number of recomputed layers whose peak fits; all that backward reaches, if none does."""
        counts = range(len(self.kept) + 1)
        return next((count for count in counts if self.peak_bytes(count) <= budget_bytes), len(self.kept))


def plan_activations(
    shape: Mapping[str, Any], cfg: RunConfig, micro_batch: int, device_type: str, document_tokens: int | None = None
) -> ActivationPlan:
    """Activations of `micro_batch` full sequences. shape: keys as in config.json.

    document_tokens: length of the documents in them; None takes each sequence for one document.
    """
    tokens, layers = micro_batch * cfg.data.max_length, shape["num_hidden_layers"]
    width = DTYPE_BYTES[cfg.model.dtype]
    adapted = [adapted_linears(layer, cfg.lora) for layer in range(layers)]
    first = first_reached(adapted, cfg)
    linears = linear_shapes(shape)
    kept = tuple(
        tokens * sum(kept_bytes(shape, cfg, names, device_type, document_tokens).values()) for names in adapted[first:]
    )
    packed = cfg.quant.type in ("nf4", "fp4") and not cfg.quant.resident
    dequantised = max(out * inputs for out, inputs in linears.values()) * DTYPE_BYTES[cfg.quant.compute_dtype]
    mlp_work = _MLP_WORK["compiled" if cfg.train.compile or not cfg.train.fast else "plain torch"]
    values, bytes_each = _LOGITS["cuda" if device_type == "cuda" else "cpu"]
    logits = min(values, tokens * shape["vocab_size"]) * bytes_each
    if cfg.distill.objective != "none":
        logits *= 2  # the teacher's beside the student's
    hidden = tokens * shape["hidden_size"] * width
    return ActivationPlan(
        kept=kept,
        input=hidden,
        first=first,
        # Beside the logits: the last hidden states, their normed copy, the rows with a target, and their gradient.
        head=logits + 4 * hidden,
        work=tokens * shape["intermediate_size"] * mlp_work + 4 * hidden + (dequantised if packed else 0),
        layers=layers,
    )


def first_reached(adapted: list[frozenset[str]], cfg: RunConfig) -> int:
    """The lowest layer that backward reaches: nothing below the first trained weight builds a graph."""
    embeddings = cfg.lora.new_tokens or any("embed" in name for name in cfg.lora.modules_to_save)
    return 0 if embeddings else next((layer for layer, names in enumerate(adapted) if names), len(adapted))


def kept_bytes(
    shape: Mapping[str, Any],
    cfg: RunConfig,
    adapted: frozenset[str],
    device_type: str,
    document_tokens: int | None = None,
) -> dict[str, float]:
    """Bytes a token that a layer with adapters on these linears keeps for its backward pass, by what they are."""
    width, linears = DTYPE_BYTES[cfg.model.dtype], linear_shapes(shape)
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    terms = {
        # transformers' norm keeps fp32 copies of both of its inputs, and their scales.
        "norms": 2 * hidden * width if cfg.train.fast else 2 * (hidden * 4 + 4),
        "attention": _attention_bytes(shape, cfg, device_type, document_tokens or cfg.data.max_length),
        "mlp": 0.0,
        "adapters": 0.0,
        "dropout": 0.0,
        "dora": sum(8 * linears[name][0] for name in adapted) if cfg.lora.dora else 0.0,
    }
    for room in _ROOMS:
        mine = adapted & room
        inputs = [linears[name][1] for name in mine]
        # What the kernels do not know is computed by PEFT's own modules.
        if not cfg.train.fast or cfg.quant.type == "int8" or (cfg.lora.dora and mine):
            # gate, silu(gate) and up; an fp32 copy of its input and the product with A for each adapter by itself; on a
            # CPU dropout keeps what it multiplied with, in fp32.
            terms["mlp"] += 3 * inner * width if room is _MLP else 0
            terms["adapters"] += sum(4 * (size + cfg.lora.rank) for size in inputs)
            terms["dropout"] += sum(inputs) * (1 if device_type == "cuda" else 4) if cfg.lora.dropout else 0
        else:
            # gate and up, of which what down_proj reads is made again; one copy for all that read the same; a mask.
            terms["mlp"] += 2 * inner * width if room is _MLP else 0
            terms["adapters"] += width * max((linears[name][1] for name in mine - {"down_proj"}), default=0)
            terms["dropout"] += sum(inputs) if cfg.lora.dropout else 0
    return terms


def _attention_bytes(shape: Mapping[str, Any], cfg: RunConfig, device_type: str, document: int) -> float:
    """Queries, keys and values; where a kernel keeps them, its output and the fp32 log-sum of each head."""
    width, linears = DTYPE_BYTES[cfg.model.dtype], linear_shapes(shape)
    heads, queries, keys = shape["num_attention_heads"], linears["q_proj"][0], linears["k_proj"][0]
    own = cfg.model.attention == "auto"
    if own and device_type == "cpu":
        rounded = math.ceil(document / _ROUNDING) * _ROUNDING
        output = queries * width + 4 * heads if rounded >= _FUSED_BACKWARD_FROM else 0
        return rounded / document * ((queries + 2 * keys) * width + output)
    if own or cfg.model.attention == "flash_attention_2":
        return (2 * queries + 2 * keys) * width + 4 * heads
    # transformers repeats keys and values for every head, and gives each token of the row a mask.
    row = cfg.data.max_length
    if cfg.model.attention == "eager":
        return 3 * queries * width + heads * row * (4 + width)
    return 4 * queries * width + 4 * heads + row * width
