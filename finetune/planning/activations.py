"""Activation memory of a forward and backward pass, and how many layers to recompute so that it fits.

Computed from shapes and config alone. Tests compare a layer's activations with the tensors that autograd saves.

Names: D hidden width, I intermediate width, H query heads, K key-value heads, W head width, L tokens of a document.
Tokens are rows of a sequence; attention runs over its places (sequences.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from finetune.ops import limits
from finetune.planning import gpu_layers, towers
from finetune.planning.inputs import PlanInputs
from finetune.planning.static_memory import DTYPE_BYTES, gathered_layer_bytes, layer_precisions, parameters_of

# Linears that one fused kernel computes together. The kernel handles all of a group or none.
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
_FUSED_GROUPS = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"o_proj"}), _MLP)
# Logits of softmax blocks alive at once on a CPU: one block per thread, of two threads.
_SOFTMAX_VALUES = 2 * limits.SOFTMAX_BLOCK_VALUES["cpu"]
# Temporaries of a softmax block: three fp32 values per logit; with a teacher four more (ops/divergence.py).
_SOFTMAX_BYTES, _DIVERGENCE_BYTES = 12, 28
# ops/attention.py: fp32 values alive per pair of query and key.
_SCORE_BYTES = 20
# Bytes alive per value [T, I] in the MLP's backward pass, per kind of elementwise kernel. Plain torch: eight fp32
# values of swiglu_backward_ (gate, up, gradient, sigmoid, four products) and the 16-bit gradient. Compiled: one pass.
# PEFT's own modules keep the gradients of product, gate and up.
_MLP_BACKWARD_BYTES = {"plain torch": 34, "compiled": 4, "peft": 8}
# The same without gradients: gate, up and product in 16 bit, and two fp32 values of swiglu_forward.
_MLP_FORWARD_BYTES = {"plain torch": 12, "compiled": 6, "peft": 8}
# Values [T, D] alive in attention without gradients: mostly rotated and reordered copies of the queries.
_ATTENTION_FORWARD = 8
# glibc's heap, measured on 0.5B and 1.5B with 512 to 4,096 tokens. Per kept layer one block [T, I] is lost: smaller
# kept tensors take the place of the product of gate and up. Where layers are recomputed, freed blocks lie around the
# kept inputs: 1.6 to 5 times what such a layer keeps in the heap.
_GARBAGE_LAYERS = 3.5
# The part of the scores of rows with several places that does not fit into blocks which the MLP left free, in 16 bit:
# measured on four and eight layers of 0.5B with 1,000 to 4,300 places. In fp32 these blocks are larger.
_GATHERED_SCORES = 0.5
# glibc maps blocks of this size one by one, so they leave no holes (DEFAULT_MMAP_THRESHOLD_MAX, 64-bit).
_MAPPED_FROM_BYTES = 32 * 2**20
# DoRA (peft 0.21) computes W + BA in fp32 to measure its norm: the weight, the product and the sum. A recomputed layer
# does so in backward, with the unit matrix that B A multiplies; 14 bytes a weight beside it, by the trace of a GPU.
_DORA_BYTES, _DORA_BYTES_RECOMPUTED = 12, 14


@dataclass(frozen=True, slots=True)
class ActivationPlan:
    """Activation bytes of one micro-batch on one rank.

    kept: per layer that backward reaches, from the lowest on, what it holds if it is not recomputed.
    input: what a recomputed layer holds. layers: all layers of the model.
    head: workspace of the loss. work: temporaries of a layer's backward pass.
    hole: lost in a CPU's heap per kept layer until the forward pass ends (then training calls malloc_trim).
    garbage: free but held by a CPU's heap while recomputed layers run.
    again, work_again: `kept` and `work` of a layer that is recomputed; None if they are the same.
    media: embeddings of media, and what trained towers keep for backward.
    gathered, gathered_head: of a sharded base: weights of layers (the current and the next one), and the head's matrix.
    """

    kept: tuple[float, ...]
    input: float
    head: float
    work: float
    layers: int
    hole: float = 0.0
    garbage: float = 0.0
    again: float | None = None
    work_again: float | None = None
    media: float = 0.0
    gathered: float = 0.0
    gathered_head: float = 0.0

    def peak_bytes(self, recomputed: int, offload: bool = False) -> float:
        """Return the peak if the first `recomputed` of the layers in `kept` are recomputed."""
        return max(sum(parts.values()) for parts in self.moments(recomputed, offload).values())

    def moments(self, recomputed: int, offload: bool = False) -> dict[str, dict[str, float]]:
        """Return the bytes per part at each moment that can be the peak.

        offload: inputs are in main memory. At most two are on the device, and the last one as backward begins
            (models/offload.py).
        """
        inputs = min(recomputed, 2 if offload else recomputed) * self.input
        stored = min(inputs, self.input) if offload else inputs
        media = {"activations of media": self.media} if self.media else {}
        if self.gathered:
            media["gathered layers"] = self.gathered
        held = {"inputs of recomputed layers": stored, "activations kept": sum(self.kept[recomputed:]), **media}
        moments = {
            "training step, at the loss": {**held, "loss workspace": self.head, "gathered head": self.gathered_head},
            "training step, as backward begins": {**held, "layer workspace": self.work},
        }
        if holes := (len(self.kept) - recomputed) * self.hole:
            moments["training step, as the forward pass ends"] = {**held, "holes in the heap": holes}
        if self.gathered_head:  # what comes from other ranks, and the matrix that it is copied into
            moments["training step, as the head is gathered"] = {**held, "gathered head": 2 * self.gathered_head}
        if recomputed:
            kept = self.kept[recomputed - 1] if self.again is None else self.again
            work = self.work if self.work_again is None else self.work_again
            again = {"activations kept": kept, "layer workspace": work}
            parts = {"inputs of recomputed layers": inputs, **again, **media, "holes in the heap": self.garbage}
            moments["training step, while a layer is recomputed"] = parts
        return moments

    def fewest(self, budget_bytes: float) -> int:
        """Return the smallest number of recomputed layers whose peak fits, else the one with the lowest peak."""
        peaks = [self.peak_bytes(count) for count in range(len(self.kept) + 1)]
        return next((count for count, peak in enumerate(peaks) if peak <= budget_bytes), peaks.index(min(peaks)))


@lru_cache(maxsize=64)
def plan_activations(inputs: PlanInputs, micro_batch: int) -> ActivationPlan:
    """Compute the activations of `micro_batch` full sequences."""
    tokens = micro_batch * inputs.sequence.rows
    media = towers.embeddings_bytes(inputs, tokens) + towers.activation_bytes(inputs, tokens)
    layers, table = gathered_bytes(inputs)
    return replace(_plan_decoder(inputs, micro_batch), media=media, gathered=layers, gathered_head=table)


def gathered_bytes(inputs: PlanInputs) -> tuple[float, float]:
    """Return the bytes that a rank of a sharded base gathers: of layers, and of the head. (0, 0): nothing is.

    A layer arrives in one block and is copied out of it. The block stays until the next layer is needed, and
    a GPU gathers that one meanwhile.
    """
    if inputs.shard_ranks == 1:
        return 0.0, 0.0
    sizes = gathered_layer_bytes(inputs.shape, inputs.model, inputs.quant, inputs.shard_ranks)
    return (3.0 if inputs.on_gpu else 2.0) * max(sizes), float(inputs.table_values * inputs.value_bytes)


def _plan_decoder(inputs: PlanInputs, micro_batch: int) -> ActivationPlan:
    """Build the plan of everything but media."""
    tokens, inner = micro_batch * inputs.sequence.rows, inputs.shape["intermediate_size"]
    width, kinds = inputs.value_bytes, []
    for layer in range(inputs.first_trained_layer, len(inputs.adapted)):
        stored = layer_precisions(inputs.family, layer, inputs.model, inputs.quant)
        kinds.append((inputs.adapted[layer], frozenset(name for name in stored if stored[name] == "int8")))
    token_bytes = {kind: sum(kept_bytes(inputs, *kind).values()) for kind in set(kinds)}
    kept = tuple(tokens * token_bytes[kind] for kind in kinds)
    hidden = tokens * inputs.shape["hidden_size"] * width
    on_cpu = inputs.device_type == "cpu"
    if inputs.on_gpu:
        return _plan_on_gpu(inputs, micro_batch, kept)
    block = _mlp_rows(inputs, tokens) * inner * width
    in_heap = on_cpu and block < _MAPPED_FROM_BYTES
    # Gate and up are such blocks.
    gathered = 0.0
    if on_cpu and inputs.places_of_a_row > 1 and width == 2:
        gathered = _GATHERED_SCORES * _score_bytes(inputs, tokens)
    layer_in_heap = max(kept, default=0.0) - (0 if in_heap else 2 * tokens * inner * width)
    return ActivationPlan(
        kept=kept,
        input=hidden,
        # With the logits: the last hidden states, their normed copy, the rows with a target, and their gradient.
        head=_head_bytes(inputs, micro_batch, 4),
        work=_layer_work(inputs, tokens) + gathered + 2 * hidden,
        work_again=_layer_work(inputs, tokens) + 2 * hidden,
        layers=len(inputs.adapted),
        hole=block if in_heap else 0.0,
        garbage=_GARBAGE_LAYERS * max(0.0, layer_in_heap) if on_cpu else 0.0,
    )


def _plan_on_gpu(inputs: PlanInputs, micro_batch: int, kept: tuple[float, ...]) -> ActivationPlan:
    """Build the plan of a GPU. kept: of layers that run their MLP on all rows at once."""
    tokens = micro_batch * inputs.sequence.rows
    hidden = tokens * inputs.shape["hidden_size"] * inputs.value_bytes
    compiled, rows = elementwise_kernels(inputs) != "plain torch", gpu_layers.tile_rows(inputs, tokens)
    tiled = rows is not None and gpu_layers.tiles_last_layer(inputs)
    work = partial(gpu_layers.layer_work, inputs, tokens, compiled=compiled)
    # A tiled MLP keeps its input in place of gate and up, like one whose gate or up trains A.
    adapted = not inputs.lora.freeze_a and any({"gate_proj", "up_proj"} & names for names in inputs.adapted)
    saved = 2 * tokens * inputs.shape["intermediate_size"] * inputs.value_bytes - (0 if adapted else hidden)
    # The first norm of a recomputed layer keeps the layer's input, which is counted already.
    again = max(kept, default=0.0) - (saved if rows is not None else 0.0) - hidden
    if kept and not inputs.trains_embedding:
        kept = (kept[0] - hidden, *kept[1:])  # the lowest input has no gradient, so its norm keeps nothing
    if kept and tiled:
        kept = (*kept[:-1], kept[-1] - saved)
    return ActivationPlan(
        kept=kept,
        input=hidden,
        # With the logits: the rows with a target, their normed copy, and its gradient.
        head=_head_bytes(inputs, micro_batch, 3),
        work=max(_dora_bytes(inputs), work(tiled=tiled)),
        layers=len(inputs.adapted),
        again=again,
        work_again=max(_dora_bytes(inputs, recomputed=True), work(tiled=rows is not None)),
    )


def _head_bytes(inputs: PlanInputs, micro_batch: int, copies: int) -> float:
    """Return the workspace of the loss: with answers that share a prompt, of their own tokens; else of all tokens."""
    sequence = inputs.sequence
    targets = micro_batch * (sequence.rows if sequence.rows == sequence.places else math.ceil(sequence.targets))
    hidden = targets * inputs.shape["hidden_size"] * inputs.value_bytes
    return loss_bytes(inputs, targets, inputs.trains_on_teacher) + copies * hidden


def forward_bytes(inputs: PlanInputs, shape: Mapping[str, Any], tokens: int, *, mlp_rows: int) -> float:
    """Return the largest workspace of a layer without gradients: of its MLP, or of attention.

    shape: of the student or the teacher. mlp_rows: rows that the MLP processes at a time.
    """
    mlp = _mlp_bytes(inputs, min(tokens, mlp_rows) * shape["intermediate_size"], _MLP_FORWARD_BYTES, shape)
    hidden = tokens * shape["hidden_size"] * inputs.value_bytes
    return max(mlp + 3 * hidden, _ATTENTION_FORWARD * hidden)


def loss_bytes(inputs: PlanInputs, tokens: int, teacher: bool, *, training: bool = True) -> float:
    """Return the bytes of a chunk of logits, its gradient, and a softmax block's temporaries.

    A GPU multiplies in fp32 and copies the gradient in the model's dtype. A CPU overwrites the logits.
    teacher: its probabilities are compared. training: with the gradient.
    """
    kind, width, vocabulary = inputs.device_kind, inputs.value_bytes, inputs.shape["vocab_size"]
    # losses/chunked.py makes chunks of nearly equal length, here of a sequence whose every token is a target.
    setting = inputs.train.gradient_checkpointing
    limit = limits.LOGITS_VALUES[str(setting) if inputs.on_gpu and setting in ("all", "offload") else kind]
    chunks = math.ceil(tokens / max(1, limit // vocabulary))
    values = math.ceil(tokens / chunks) * vocabulary
    sampled = not teacher or inputs.teacher_is_sampled
    if inputs.on_gpu:
        # One row more than a chunk (losses/chunked.py), in fp32. A compiled softmax has no temporaries. Cross-entropy
        # writes its gradient in the model's dtype; that of a teacher is copied after the softmax.
        buffer, copied = 4 * (values + vocabulary), values * width if training and width < 4 else 0
        temporary = _SOFTMAX_BYTES if sampled else _DIVERGENCE_BYTES
        block = 0 if elementwise_kernels(inputs) == "compiled" else min(values, limits.PLAIN_BLOCK_VALUES)
        if teacher:
            return (1 if sampled else 2) * buffer + max(copied, block * temporary)
        return buffer + copied + block * temporary
    logits, block = values * width, min(values, _SOFTMAX_VALUES)
    if sampled:
        return logits + block * _SOFTMAX_BYTES
    return 2 * logits + block * _DIVERGENCE_BYTES


def elementwise_kernels(inputs: PlanInputs, shape: Mapping[str, Any] | None = None) -> str:
    """Return how elementwise steps run: "compiled", "plain torch", or "peft" for PEFT's own modules.

    `train.compile=null` compiles runs that repay it. A run of unknown length counts as such a run.
    """
    train = inputs.train
    if train.kernels == "peft":
        return "peft"
    if train.compile is not None or train.max_steps is None:
        return "plain torch" if train.compile is False else "compiled"
    tokens = train.max_steps * train.batch_size * inputs.data.max_length
    work = 4.0 * parameters_of(shape or inputs.shape) * tokens
    return "compiled" if work >= limits.COMPILE_FROM_FLOPS else "plain torch"


def _layer_work(inputs: PlanInputs, tokens: int) -> float:
    """The largest temporaries of a layer's backward pass: of its MLP, attention, or a dequantized weight."""
    rows, inner = _mlp_rows(inputs, tokens), inputs.shape["intermediate_size"]
    # Gradients of down_proj's input are computed for all blocks of rows before the first block goes on.
    waiting = (tokens - rows) * inner * inputs.value_bytes
    mlp = waiting + _mlp_bytes(inputs, rows * inner, _MLP_BACKWARD_BYTES)
    attention = _score_bytes(inputs, tokens) if inputs.device_type == "cpu" else 0.0
    largest = max(out * size for out, size in inputs.linears.values())
    dequantizes = inputs.quant.type == "nf4" and not inputs.quant.keep_dequantized
    weight = largest * DTYPE_BYTES[inputs.quant.compute_dtype] if dequantizes else 0
    mlp = max(mlp, weight + waiting + 4 * rows * inner)
    return max(mlp, attention, _dora_bytes(inputs))


def _score_bytes(inputs: PlanInputs, tokens: int) -> float:
    """Return the scores of a block of queries of each document, and their gradients, in a layer's backward pass."""
    document = inputs.sequence.document
    if inputs.model.attention != "auto" or document >= limits.FUSED_ATTENTION_FROM_TOKENS:
        return 0.0
    queries = min(limits.QUERIES_PER_BLOCK, document)
    return tokens * inputs.places_of_a_row * inputs.shape["num_attention_heads"] * queries * _SCORE_BYTES


def _dora_bytes(inputs: PlanInputs, *, recomputed: bool = False) -> float:
    """Return the temporaries of the largest matrix with DoRA; 0 without it."""
    if not inputs.lora.dora:
        return 0.0
    sizes = [inputs.linears[name] for name in frozenset().union(*inputs.adapted)]
    if recomputed:
        return float(max((_DORA_BYTES_RECOMPUTED * out * size + 4 * size**2 for out, size in sizes), default=0))
    return float(max((_DORA_BYTES * out * size for out, size in sizes), default=0))


def _mlp_bytes(
    inputs: PlanInputs, values: int, table: Mapping[str, int], shape: Mapping[str, Any] | None = None
) -> float:
    """Return the workspace of an MLP whose matrices [T, I] have `values` each.

    On a GPU, plain torch runs in blocks (ops/dispatch.py).
    """
    kernels = elementwise_kernels(inputs, shape)
    total = values * table[kernels]
    if kernels == "plain torch" and inputs.on_gpu:
        block = min(values, limits.PLAIN_BLOCK_VALUES)
        total = values * table["compiled"] + block * (table[kernels] - table["compiled"])
    return total * inputs.value_bytes / 2


def _mlp_rows(inputs: PlanInputs, tokens: int) -> int:
    """Rows per pass of an MLP with gradients; all of them if the fused kernels do not handle it."""
    lora, quant = inputs.lora, inputs.quant
    unfused = inputs.train.kernels == "peft" or quant.type == "int8" or quant.int8
    special = any(_MLP & names for names in inputs.adapted) and (lora.dora or lora.dropout)
    return tokens if inputs.device_type != "cpu" or unfused or special else min(tokens, limits.MLP_ROWS)


def kept_bytes(inputs: PlanInputs, adapted: frozenset[str], int8: frozenset[str] = frozenset()) -> dict[str, float]:
    """Return the bytes per token and purpose that a layer keeps for its backward pass.

    adapted: linears of the layer with an adapter. int8: its linears stored in int8, which the kernels do not handle.
    """
    width, linears, lora = inputs.value_bytes, inputs.linears, inputs.lora
    hidden, inner = inputs.shape["hidden_size"], inputs.shape["intermediate_size"]
    peft = inputs.train.kernels == "peft"
    # The input of o_proj is the output of attention; a copy on a CPU, and where rows have several places.
    keeps_output = inputs.flash_attention and inputs.model.attention == "auto" and inputs.places_of_a_row == 1
    heads = inputs.shape["num_attention_heads"] + inputs.shape["num_key_value_heads"] if inputs.family.head_norms else 0
    normed = linears["q_proj"][0] + linears["k_proj"][0] if inputs.family.head_norms else 0
    terms = {
        # transformers' norm keeps fp32 copies of both of its inputs, and their scales.
        "norms": 4 * (2 * hidden + normed) + 4 * (2 + heads) if peft else (2 * hidden + normed) * width,
        "attention": _attention_bytes(inputs),
        "mlp": 0.0,
        "adapters": 0.0,
        "dropout": 0.0,
        "dora": sum(8 * linears[name][0] for name in adapted) if lora.dora else 0.0,
    }
    for group in _FUSED_GROUPS:
        mine = adapted & group
        sizes = [linears[name][1] for name in mine]
        # PEFT's own modules compute what the kernels do not handle.
        if peft or int8 & group or (lora.dora and mine):
            # gate, silu(gate) and up; per adapter an fp32 copy of its input and the product with A; on a CPU dropout
            # keeps its factors in fp32.
            terms["mlp"] += 3 * inner * width if group is _MLP else 0
            terms["adapters"] += sum(4 * ((0 if lora.freeze_a else size) + lora.rank) for size in sizes)
            terms["dropout"] += sum(sizes) * (1 if inputs.on_gpu else 4) if lora.dropout else 0
        else:
            # gate and up, from which down_proj's input is recomputed; one copy of a shared input, or each product with
            # a frozen A; a mask.
            terms["mlp"] += 2 * inner * width if group is _MLP else 0
            copied = mine - ({"down_proj", "o_proj"} if keeps_output else {"down_proj"})
            shared = max((linears[name][1] for name in copied), default=0)
            terms["adapters"] += width * (lora.rank * len(mine) if lora.freeze_a else shared)
            terms["dropout"] += sum(sizes) if lora.dropout else 0
    return terms


def _attention_bytes(inputs: PlanInputs) -> float:
    """Queries, keys and values; where a kernel keeps them, its output and each head's log-sum in fp32. Per row."""
    width, kind, places = inputs.value_bytes, inputs.model.attention, inputs.places_of_a_row
    heads, queries, keys = inputs.shape["num_attention_heads"], inputs.linears["q_proj"][0], inputs.linears["k_proj"][0]
    if kind == "auto" and inputs.device_type == "cpu":
        document = inputs.sequence.document
        padded = math.ceil(document / limits.DOCUMENT_TOKENS_MULTIPLE) * limits.DOCUMENT_TOKENS_MULTIPLE
        output = queries * width + 4 * heads if padded >= limits.FUSED_ATTENTION_FROM_TOKENS else 0
        return places * padded / document * ((queries + 2 * keys) * width + output)
    if kind == "auto" and not inputs.flash_attention:
        if inputs.attention_in_fp32:
            return places * (queries + 2 * keys) * width
        # Keys and values for every query head, the output and its copy in the order of the rows.
        return 3 * places * queries * width + places * 4 * heads + queries * width
    if kind in ("auto", "flash_attention_2"):
        return places * ((2 * queries + 2 * keys) * width + 4 * heads)
    # transformers repeats keys and values for every head, and builds a mask per token of the row.
    row = inputs.data.max_length
    if kind == "eager":
        return 3 * queries * width + heads * row * (4 + width)
    return 4 * queries * width + 4 * heads + row * width
