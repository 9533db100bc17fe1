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
from finetune.ops import limits
from finetune.planning.static_memory import (
    DTYPE_BYTES,
    adapted_linears,
    layer_precisions,
    linear_shapes,
    parameters_of,
)
from finetune.planning.teacher import gives_sample, teaches_steps

# Linears that a kernel computes together; if it does not know one of them, none.
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
_ROOMS = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"o_proj"}), _MLP)
# Softmax works in one block per thread: here two threads. Three fp32 values of each logit are alive.
_SOFTMAX_VALUES = {"cuda": limits.SOFTMAX_BLOCK_VALUES["cuda"], "cpu": 2 * limits.SOFTMAX_BLOCK_VALUES["cpu"]}
_BLOCK_BYTES = 12
# A teacher's logits beside the student's, and of each block's values the four more that ops/divergence.py compares.
_TEACHER_BLOCK_BYTES = 28
# ops/cpu_attention.py: bytes alive per pair of a query and a key.
_SCORE_BYTES = 20
# Bytes alive a value of [T, I] in the MLP's backward pass, by how ops/elementwise.py runs. Plain: eight fp32 values in
# swiglu_backward_ (gate, up, gradient, sigmoid, their product, two factors of a product, the product) and the 16-bit
# gradient. Compiled, one pass makes it all. PEFT's own modules keep the gradients of product, gate and up.
_MLP_WORK = {"plain torch": 34, "compiled": 4, "peft": 8}
# Of a forward pass without gradients: gate, up and their product in 16 bit, and two fp32 values in swiglu_forward.
_MLP_FORWARD = {"plain torch": 12, "compiled": 6, "peft": 8}
# Values of [T, D] alive in attention without gradients: mostly copies of the queries (rotated, padded, multiplied).
_ATTENTION_FORWARD = 8
# glibc's heap, measured on 0.5B and 1.5B with 512 to 4,096 tokens. Beside each kept layer one block [T, I], the product
# of gate and up, is lost: smaller kept tensors come to lie in its place. Where layers run again in backward, what they
# freed lies around the inputs that are kept: 1.6 to 5 times what such a layer keeps in the heap.
_GARBAGE_LAYERS = 3.5
# glibc maps blocks from here on one by one and leaves no holes of them (DEFAULT_MMAP_THRESHOLD_MAX, 64-bit).
_MAPPED_FROM = 32 * 2**20
# DoRA (peft 0.21) makes W + BA in fp32 to measure its norm: the weight, the product and the sum.
_DORA_BYTES = 12


@dataclass(frozen=True, slots=True)
class ActivationPlan:
    """Bytes of one micro-batch on one rank, by what they are for.

    kept: what each layer that backward reaches holds when it is not recomputed, from the lowest of them on. input: what
    a recomputed one holds. first: number of the lowest one. head: the loss's work, when all of that is alive.
    work: temporaries of a layer's backward pass. layers: all of the model's.
    Of a CPU's allocator: hole, what it cannot use again beside each kept layer until the forward pass is done (then
    training/capacity.py gives it back); garbage, what it holds free while recomputed layers run forward and backward.
    """

    kept: tuple[float, ...]
    input: float
    first: int
    head: float
    work: float
    layers: int
    hole: float = 0.0
    garbage: float = 0.0

    def peak_bytes(self, recomputed: int, offload: bool = False) -> float:
        """The most that is alive at once when the first `recomputed` of the layers in `kept` are recomputed."""
        return max(sum(parts.values()) for parts in self.moments(recomputed, offload).values())

    def moments(self, recomputed: int, offload: bool = False) -> dict[str, dict[str, float]]:
        """What is alive by part, at the moments that can be the peak: at the loss, and while the first layer of
        backward or the topmost recomputed one is at work.

        offload: of the inputs in main memory two are on the device, one in use and one on its way.
        """
        inputs = min(recomputed, 2 if offload else recomputed) * self.input
        held = {"inputs of recomputed layers": inputs, "activations kept": sum(self.kept[recomputed:])}
        moments = {
            "loss": {**held, "loss workspace": self.head},
            "backward": {**held, "layer workspace": self.work},
        }
        if holes := (len(self.kept) - recomputed) * self.hole:
            moments["forward"] = {**held, "holes in the heap": holes}
        if recomputed:
            again = {"activations kept": self.kept[recomputed - 1], "layer workspace": self.work}
            moments["recomputing"] = {"inputs of recomputed layers": inputs, **again, "holes in the heap": self.garbage}
        return moments

    def fewest(self, budget_bytes: float) -> int:
        """The smallest number of recomputed layers whose peak fits; the one with the lowest peak, if none does."""
        peaks = [self.peak_bytes(count) for count in range(len(self.kept) + 1)]
        return next((count for count, peak in enumerate(peaks) if peak <= budget_bytes), peaks.index(min(peaks)))


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
    eight_bit = [_in_eight_bit(layer, cfg) for layer in range(layers)]
    bytes_of: dict[tuple[frozenset[str], frozenset[str]], float] = {}
    for kinds in zip(adapted[first:], eight_bit[first:], strict=True):
        if kinds not in bytes_of:
            bytes_of[kinds] = sum(kept_bytes(shape, cfg, kinds[0], device_type, document_tokens, kinds[1]).values())
    kept = tuple(tokens * bytes_of[kinds] for kinds in zip(adapted[first:], eight_bit[first:], strict=True))
    hidden = tokens * shape["hidden_size"] * width
    block = _mlp_rows(cfg, frozenset().union(*adapted), tokens, device_type) * shape["intermediate_size"] * width
    in_heap = device_type == "cpu" and block < _MAPPED_FROM
    # Gate and up are such blocks.
    layer = max(kept, default=0.0) - (0 if in_heap else 2 * tokens * shape["intermediate_size"] * width)
    return ActivationPlan(
        kept=kept,
        input=hidden,
        first=first,
        # Beside the logits: the last hidden states, their normed copy, the rows with a target, and their gradient.
        head=loss_bytes(cfg, tokens, shape["vocab_size"], device_type, teaches_steps(cfg)) + 4 * hidden,
        work=_layer_work(shape, cfg, tokens, device_type, document_tokens) + 2 * hidden,
        layers=layers,
        hole=block if in_heap else 0.0,
        garbage=_GARBAGE_LAYERS * max(0.0, layer) if device_type == "cpu" else 0.0,
    )


def evaluation_bytes(shape: Mapping[str, Any], cfg: RunConfig, tokens: int, device_type: str) -> dict[str, float]:
    """What scoring held-out rows holds, at its widest: in a layer's MLP, or where logits are compared with targets and,
    if the run has a teacher, with its.
    """
    hidden = tokens * shape["hidden_size"] * DTYPE_BYTES[cfg.model.dtype]
    plain = (
        device_type == "cpu"
        and cfg.train.kernels == "fused"
        and (cfg.quant.type == "none" or cfg.quant.keep_dequantized)
    )
    layer = forward_bytes(shape, cfg, tokens, in_blocks=plain)
    loss = loss_bytes(cfg, tokens, shape["vocab_size"], device_type, cfg.asks_teacher) + 3 * hidden
    return {"layer workspace": layer} if layer > loss else {"loss workspace": loss}


def forward_bytes(shape: Mapping[str, Any], cfg: RunConfig, tokens: int, in_blocks: bool) -> float:
    """What a forward pass without gradients holds in a layer, at its widest: in the MLP, or in attention.

    in_blocks: whether the MLP takes some rows at a time, as one of 16-bit weights does on a CPU.
    """
    width = DTYPE_BYTES[cfg.model.dtype]
    rows = min(tokens, limits.MLP_FORWARD_ROWS) if in_blocks else tokens
    mlp = rows * shape["intermediate_size"] * _MLP_FORWARD[kernels_of(cfg, shape)] * width / 2
    hidden = tokens * shape["hidden_size"] * width
    return max(mlp + 3 * hidden, _ATTENTION_FORWARD * hidden)


def loss_bytes(cfg: RunConfig, tokens: int, vocabulary: int, device_type: str, teacher: bool) -> float:
    """A chunk of logits, as multiplied (fp32 on a GPU, rounded once on a CPU), its gradient, and a block's temporaries.

    A CPU writes the gradient in the logits' place; on a GPU it is a copy in the model's type. teacher: whether its
    probabilities are compared.
    """
    cuda, width = device_type == "cuda", DTYPE_BYTES[cfg.model.dtype]
    kind = "cuda" if cuda else "cpu"
    # losses/chunked.py makes chunks of nearly one length, here of a sequence whose every token is a target.
    chunks = math.ceil(tokens / max(1, limits.LOGITS_VALUES[kind] // vocabulary))
    values = math.ceil(tokens / chunks) * vocabulary
    each = 4 + width if cuda and width < 4 else width
    logits, block = values * each, min(values, _SOFTMAX_VALUES[kind]) * _BLOCK_BYTES
    if not teacher or gives_sample(cfg):
        return logits + block
    return 2 * logits + min(values, _SOFTMAX_VALUES[kind]) * _TEACHER_BLOCK_BYTES


def kernels_of(cfg: RunConfig, shape: Mapping[str, Any]) -> str:
    """How the elementwise steps run: compiled, plain torch, or PEFT's and transformers' own modules.

    `train.compile=null` compiles runs that repay it; one whose steps are not known yet is taken for such a run.
    """
    if cfg.train.kernels == "peft":
        return "peft"
    if cfg.train.compile is not None or cfg.train.max_steps is None:
        return "plain torch" if cfg.train.compile is False else "compiled"
    tokens = cfg.train.max_steps * cfg.train.batch_size * cfg.data.max_length
    return "compiled" if 4.0 * parameters_of(shape) * tokens >= limits.COMPILE_FROM_FLOPS else "plain torch"


def _layer_work(
    shape: Mapping[str, Any], cfg: RunConfig, tokens: int, device_type: str, document_tokens: int | None
) -> float:
    """The most that one layer's backward pass holds beside what was kept: in its MLP, in its attention, or while a
    weight is in 16 bit.
    """
    linears = linear_shapes(shape)
    largest = max(out * inputs for out, inputs in linears.values())
    adapted = frozenset().union(*(adapted_linears(layer, cfg.lora) for layer in range(shape["num_hidden_layers"])))
    rows = _mlp_rows(cfg, adapted, tokens, device_type)
    width = shape["intermediate_size"] * DTYPE_BYTES[cfg.model.dtype]
    # Gradients of what down_proj reads are made of all blocks of rows before the first goes on.
    waiting = (tokens - rows) * width
    mlp = waiting + rows * width * _MLP_WORK[kernels_of(cfg, shape)] / 2
    attention = 0.0
    document = document_tokens or cfg.data.max_length
    if device_type == "cpu" and cfg.model.attention == "auto" and document < limits.FUSED_ATTENTION_FROM_TOKENS:
        attention = tokens * shape["num_attention_heads"] * min(limits.QUERIES_PER_BLOCK, document) * _SCORE_BYTES
    four_bit = cfg.quant.type == "nf4" and not cfg.quant.keep_dequantized
    weight = largest * DTYPE_BYTES[cfg.quant.compute_dtype] if four_bit else 0
    if device_type == "cuda":
        held = weight  # ops/linear.py keeps one buffer of the largest matrix
    else:
        held, mlp = 0.0, max(mlp, weight + waiting + 4 * rows * shape["intermediate_size"])
    dora = max((_DORA_BYTES * linears[name][0] * linears[name][1] for name in adapted), default=0) * cfg.lora.dora
    return held + max(mlp, attention, dora)


def _mlp_rows(cfg: RunConfig, adapted: frozenset[str], tokens: int, device_type: str) -> int:
    """Rows that pass through an MLP at once where a gradient is wanted; all of them, if the kernels do not know it.

    adapted: the linears that have an adapter in any layer.
    """
    unknown = cfg.train.kernels == "peft" or cfg.quant.type == "int8" or cfg.quant.int8
    whole = unknown or (_MLP & adapted and (cfg.lora.dora or cfg.lora.dropout))
    return tokens if device_type != "cpu" or whole else min(tokens, limits.MLP_ROWS)


def _in_eight_bit(layer: int, cfg: RunConfig) -> frozenset[str]:
    if cfg.quant.type != "int8" and not cfg.quant.int8:
        return frozenset()
    return frozenset(name for name, kind in layer_precisions(layer, cfg.model, cfg.quant).items() if kind == "int8")


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
    eight_bit: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """Bytes a token that a layer with adapters on these linears keeps for its backward pass, by what they are.

    eight_bit: its linears that are stored in int8, which the kernels do not know.
    """
    width, linears = DTYPE_BYTES[cfg.model.dtype], linear_shapes(shape)
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    terms = {
        # transformers' norm keeps fp32 copies of both of its inputs, and their scales.
        "norms": 2 * hidden * width if cfg.train.kernels == "fused" else 2 * (hidden * 4 + 4),
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
        if cfg.train.kernels == "peft" or eight_bit & room or (cfg.lora.dora and mine):
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
        rounded = math.ceil(document / limits.DOCUMENT_TOKENS_MULTIPLE) * limits.DOCUMENT_TOKENS_MULTIPLE
        output = queries * width + 4 * heads if rounded >= limits.FUSED_ATTENTION_FROM_TOKENS else 0
        return rounded / document * ((queries + 2 * keys) * width + output)
    if own or cfg.model.attention == "flash_attention_2":
        return (2 * queries + 2 * keys) * width + 4 * heads
    # transformers repeats keys and values for every head, and gives each token of the row a mask.
    row = cfg.data.max_length
    if cfg.model.attention == "eager":
        return 3 * queries * width + heads * row * (4 + width)
    return 4 * queries * width + 4 * heads + row * width
