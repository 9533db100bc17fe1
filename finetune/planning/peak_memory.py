"""The peak memory of a run on one rank, per part and per moment.

On a GPU: what torch's allocator hands out (`max_memory_allocated`). On a CPU: the resident memory of the process,
with its libraries and the pages of mapped weight files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config import schema
from finetune.ops import limits
from finetune.planning import gpu_layers, towers
from finetune.planning.activations import ActivationPlan, forward_bytes, gathered_bytes, loss_bytes, plan_activations
from finetune.planning.inputs import PlanInputs
from finetune.planning.sampling import AnswerBatch, answer_bytes, cache_bytes, evaluated_batch, sampled_batch
from finetune.planning.static_memory import DTYPE_BYTES, StaticMemory, linear_shapes
from finetune.system import machine
from finetune.system.accelerator import on_gpu, table_key

MIB = 2**20
# Resident with every library imported and no model: 341 MiB of the process and 104 MiB of pages of shared libraries,
# measured with CPython 3.11, torch 2.13 (CPU build), transformers 5.23, peft 0.21 on Linux.
_PROCESS_BYTES = 445 * MIB
# Added by FSDP2 and gloo, imported and joined (measured: 475 MiB before the base of a sharded run loads).
_SHARDING_BYTES = 30 * MIB
# Added by any running training: 44 MiB for modules and library pages of first use, and 45 MiB that glibc's heap holds
# free, thread caches and buffers of oneDNN (measured with a tokenizer of 46 kB).
_HEAP_BYTES = (44 + 45) * MIB
# oneDNN compiles code per new shape of a bf16 product, half a megabyte of heap each, and keeps 1,024 of them. The
# targets of a step, a batch of an evaluation and a generated token are such shapes. How often a new one comes up was
# measured, not derived: the embedded base took 66, 100 and 173 MiB more by step 12, 60 and 400 than by step 2, two
# layers of 0.5B 55 by step 60; the first evaluation took 60 more, answering 20 rows 34 and 200 rows 70; eight layers of
# 0.5B with a reference 20 to 36 more than with a cached one.
_CODE_BY_STEP, _CODE_STEPS = 22 * MIB, 400
_CODE_OF_EVALUATION, _CODE_OF_REFERENCE = 60 * MIB, 25 * MIB
_CODE_OF_ANSWERS, _CODE_BY_ANSWER, _CODE_ANSWERS = 30 * MIB, 0.2 * MIB, 200
# A read of a mapped file brings in so many bytes around it (Linux, fault_around_bytes).
_FAULT_AROUND = 65536
# Memory of two tokenizers (the run's, the adapter's) per byte of tokenizer.json: 172 MiB for Qwen2.5's 11.4 MB, and 65
# that reading it leaves free in the heap (measured: 129 MiB are free there after loading, 10 with a small one).
_TOKENIZER_SHARE = 21.8
_QWEN_TOKENIZER_BYTES = 11_421_789
# A CUDA context with the libraries' kernels, outside the allocator: usually 0.4 to 0.6 GB, not measured by this
# package. It takes device memory but is never part of a predicted peak.
CONTEXT_BYTES = 512 * MIB
# Added to everything but weights before a run counts as fitting: the error of predictions, and on a GPU, which has not
# been measured yet, blocks that the allocator cannot reuse.
MARGIN = {"gpu": 0.18, "cpu": 0.10}
# losses/distillation.py: bytes of a sampled token, its id and its probability.
_SAMPLED_BYTES = 8 + 4

_FIXED = {"process and libraries", "tokenizers", "teacher", "a dequantized matrix"}
_ACTIVATIONS = {
    "inputs of recomputed layers",
    "activations kept",
    "activations of media",
    "layer workspace",
    "loss workspace",
    "holes in the heap",
    "gathered layers",
    "gathered head",
}


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Predicted bytes of one rank.

    moments: by name, the bytes per part. activations: of the planned micro-batch.
    teacher_unknown: the run loads a teacher of unknown shape, which is not counted.
    host_bytes: of a GPU run, main memory for offloaded inputs of recomputed layers, the input embedding, and the part
        of a sharded base.
    """

    device_type: str
    static: StaticMemory
    activations: ActivationPlan
    micro_batch: int
    recomputed: int
    moments: Mapping[str, Mapping[str, float]]
    teacher_unknown: bool = False
    host_bytes: float = 0.0

    @property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Mapping[str, float]:
        """The bytes per part at the peak."""
        return self.moments[self.moment]

    @property
    def peak_bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> float:
        """Free bytes for a safe run: each moment with a margin on all but weights, and on a GPU the context."""
        return max(self._needed(parts) for parts in self.moments.values())

    def _needed(self, parts: Mapping[str, float]) -> float:
        fixed = sum(size for name, size in parts.items() if name in self.static.parts or name in _FIXED)
        context = CONTEXT_BYTES if on_gpu(self.device_type) else 0
        return fixed + self._with_margin * (sum(parts.values()) - fixed) + context

    @property
    def _with_margin(self) -> float:
        return 1 + MARGIN[table_key(self.device_type)]

    def usable_bytes(self, free_bytes: float) -> float:
        """Return the bytes that activations of a training step may take, so that the step needs `free_bytes`.

        The result does not depend on the number of recomputed layers.
        """
        step = self.moments["training step, as backward begins"]
        other = {name: size for name, size in step.items() if name not in _ACTIVATIONS}
        return max(0.0, (free_bytes - self._needed(other)) / self._with_margin)


def predict_peak(inputs: PlanInputs, micro_batch: int, recomputed: int) -> PeakMemory:
    """Predict the memory of a run with `micro_batch` sequences per forward pass and `recomputed` layers."""
    static, on_device = inputs.static, inputs.on_gpu
    activations = plan_activations(inputs, micro_batch)
    teacher = teacher_bytes(inputs)
    # A GPU keeps buffers for a streamed teacher's layers. A CPU maps them from their files while they run.
    held = _held(inputs, (teacher or 0.0) + (streamed_bytes(inputs) if on_device else 0.0))
    # The base with one matrix in 16 bit, before the optimizer exists.
    loading = {name: size for name, size in held.items() if name not in ("optimizer", "a dequantized matrix")}
    if inputs.quant.type == "nf4":
        loading["a matrix before it is quantized"] = max(map(math.prod, inputs.linears.values())) * inputs.value_bytes
    loading |= inputs.tower_bytes
    moments = {"loading": loading}
    if inputs.towers:
        # Before training, and in each step of towers that stay.
        present = held if inputs.towers_stay else {**held, **inputs.tower_bytes, "optimizer": 0.0, "adapter": 0.0}
        moments["media in towers"] = {**present, "tower workspace": towers.work_bytes(inputs)}
    from_teacher = _teacher_parts(inputs, micro_batch)
    offload = inputs.train.gradient_checkpointing == "offload" and on_device
    steps = activations.moments(recomputed, offload)
    if on_device and (again := steps.get("training step, while a layer is recomputed")):
        # Backward ends with the lowest layer: its input is alive, and all gradients.
        ends = {"inputs of recomputed layers": activations.input, "gradients": static.parts.get("gradients", 0.0)}
        steps["training step, while the lowest layer is recomputed"] = {**again, **ends}
    for name, parts in steps.items():
        moments[name] = {**held, **from_teacher, **parts}
    if inputs.learns_from_rewards and inputs.runs_reference:
        # The reference runs after the policy, whose activations are kept.
        workspace = _forward_layer(inputs, micro_batch * inputs.sequence.rows)
        kept = {**moments["training step, as backward begins"], "layer workspace": workspace}
        moments["training step, as the reference runs"] = kept
    if inputs.trained_towers:
        works = {"activations of media": activations.media, "tower workspace": towers.backward_bytes(inputs)}
        moments["training step, as towers train"] = {**held, **works, "gradients": static.parts.get("gradients", 0.0)}
    if on_device and inputs.trains_head:
        # Its gradient in fp32, and that of one chunk, also before it is widened; and its rounded weight.
        size = inputs.table_values * (8 + 2 * inputs.value_bytes)
        moments["training step, at the loss"]["gradient of the head"] = size
    if from_teacher and inputs.runs_teacher:
        asking = _teacher_pass(inputs, micro_batch * inputs.data.max_length)
        moments["asking the teacher"] = {**held, **from_teacher, **asking}
    layers, table = gathered_bytes(inputs)
    gathered = {"gathered layers": layers, "gathered head": table}
    if inputs.samples_answers:
        moments["sampling answers"] = {**held, **gathered, **_answers(inputs, sampled_batch(inputs))}
    if inputs.evaluates and inputs.learns_from_rewards:
        moments["evaluation"] = {**held, **gathered, **_answers(inputs, evaluated_batch(inputs))}
    elif inputs.evaluates:
        moments["evaluation"] = {**held, **gathered, **_evaluation(inputs, held["teacher"])}
    gradients = static.parts.get("gradients", 0.0)
    # A trained embedding's gradient comes in the dtype of the products, and is widened to fp32.
    narrow = inputs.table_values * inputs.value_bytes if on_device and inputs.trains_embedding else 0
    moments["optimizer step"] = {**held, "gradients": gradients, "gradient of the embedding": narrow}
    moments = {name: {part: size for part, size in parts.items() if size} for name, parts in moments.items()}
    host = _host_bytes(inputs, activations, recomputed if offload else 0)
    return PeakMemory(inputs.device_type, static, activations, micro_batch, recomputed, moments, teacher is None, host)


def _host_bytes(inputs: PlanInputs, activations: ActivationPlan, offloaded: int) -> float:
    """Return the bytes that a GPU run keeps in main memory. offloaded: layers whose inputs are there."""
    size = offloaded * activations.input
    if inputs.embedding_on_host:
        size += inputs.table_values * inputs.value_bytes + activations.input
    if inputs.base_on_host:
        on_gpu = replace(inputs, parallel=schema.ParallelConfig())
        size += on_gpu.static.total_bytes - inputs.static.total_bytes
    return size


def _held(inputs: PlanInputs, teacher: float) -> dict[str, float]:
    """Parts that are in memory during the whole training."""
    gradients = inputs.static.parts.get("gradients", 0.0)
    held = {name: size for name, size in inputs.static.parts.items() if name != "gradients"}
    held["teacher"] = teacher
    if inputs.copies_adapter:  # the initial values; the current ones while the reference runs
        held["reference adapter"] = 2 * gradients
    if inputs.ranks > 1:
        held["gradients exchanged between ranks"] = min(gradients, limits.GRADIENT_BUCKET_BYTES)
    if inputs.on_gpu:
        held["a dequantized matrix"] = gpu_layers.weight_buffer_bytes(inputs)
    else:
        held["process and libraries"] = _PROCESS_BYTES + (_SHARDING_BYTES if inputs.shard_ranks > 1 else 0)
        file = Path(inputs.model.tokenizer or inputs.model.name).expanduser() / "tokenizer.json"
        held["tokenizers"] = _TOKENIZER_SHARE * (file.stat().st_size if file.is_file() else _QWEN_TOKENIZER_BYTES)
        held["allocator slack"] = _HEAP_BYTES
        held["code for shapes"] = _code_for_shapes(inputs)
        train, lora = inputs.train, inputs.lora
        trained = lora.new_tokens or "embed_tokens" in lora.modules_to_save
        mapped = "embedding" in held and inputs.shard_ranks == 1
        if mapped and train.max_steps is not None and not trained:
            # The pages that the run's tokens can touch of an untied table, which is mapped from its file.
            tokens = train.max_steps * train.batch_size * inputs.data.max_length
            held["embedding"] = min(held["embedding"], float(tokens * _FAULT_AROUND))
    return held


def _code_for_shapes(inputs: PlanInputs) -> float:
    """Code that a CPU's products keep per shape, beyond the shapes of two steps, which the slack includes."""
    if inputs.model.dtype != "bfloat16" or not machine.has_bf16_products():
        return 0.0
    steps = min(inputs.train.max_steps or _CODE_STEPS, _CODE_STEPS)
    size = _CODE_BY_STEP * math.log(max(1.0, steps / 2))
    if inputs.evaluates:
        size += _CODE_OF_EVALUATION
    if inputs.runs_reference:
        size += _CODE_OF_REFERENCE
    answers = inputs.generation.num_examples
    if inputs.samples_answers:
        answers += steps * inputs.rank_sequences * inputs.reward.group_size
    if answers:
        size += _CODE_OF_ANSWERS + _CODE_BY_ANSWER * min(answers, _CODE_ANSWERS)
    return size


def _teacher_parts(inputs: PlanInputs, micro_batch: int) -> dict[str, float]:
    """What training steps with a teacher hold: its targets, and the optimizer's moments of a recovery."""
    if not inputs.trains_on_teacher:
        return {}
    sequences, teacher = micro_batch, inputs.distill.teacher
    if teacher.placement == "streamed":  # one pass serves all sequences of a rank, of `steps_ahead` steps
        sequences = inputs.rank_sequences * teacher.steps_ahead
    parts = {"teacher's signal": signal_bytes(inputs, sequences * inputs.data.max_length)}
    if inputs.may_recover:
        parts["optimizer of a recovery"] = inputs.static.parts.get("optimizer", 0.0)
    return parts


def _teacher_pass(inputs: PlanInputs, tokens: int) -> dict[str, float]:
    """Parts of a teacher's forward pass that differ from those it always holds."""
    shape, on_cpu = inputs.teacher_shape or inputs.shape, inputs.device_type == "cpu"
    rows = limits.MLP_FORWARD_ROWS if on_cpu else tokens
    parts = {"layer workspace": forward_bytes(inputs, shape, tokens, mlp_rows=rows)}
    if on_cpu and (streamed := streamed_bytes(inputs)):
        parts["teacher"] = streamed  # its mapped head leaves the memory to its layers
    return parts


def _answers(inputs: PlanInputs, batch: AnswerBatch) -> dict[str, float]:
    """Parts of generating a batch of answers: as its prompts run, or as the longest answers end."""
    prompts = {
        "layer workspace": _forward_layer(inputs, batch.prompt_rows),
        "key-value cache": cache_bytes(inputs, batch.prompt_rows),
    }
    return max(prompts, answer_bytes(inputs, batch), key=lambda parts: sum(parts.values()))


def _forward_layer(inputs: PlanInputs, tokens: int) -> float:
    """Return the workspace of a layer of the model in training, in a pass without gradients."""
    plain = inputs.quant.type == "none" or inputs.quant.keep_dequantized
    rows = tokens
    if inputs.device_type == "cpu" and inputs.train.kernels == "fused" and plain:
        rows = limits.MLP_FORWARD_ROWS
    elif inputs.on_gpu and gpu_layers.tiles_last_layer(inputs):
        rows = gpu_layers.tile_rows(inputs, tokens) or tokens
    return forward_bytes(inputs, inputs.shape, tokens, mlp_rows=rows)


def _evaluation(inputs: PlanInputs, teacher: float) -> dict[str, float]:
    """Parts of scoring held-out rows, compared with a teacher or a reference. teacher: bytes that it always holds."""
    tokens = max(limits.EVALUATION_TOKENS, inputs.data.max_length)
    layer = _forward_layer(inputs, tokens)
    hidden = tokens * inputs.shape["hidden_size"] * inputs.value_bytes
    compared = inputs.has_teacher or inputs.runs_reference
    loss = loss_bytes(inputs, tokens, compared, training=False) + 3 * hidden
    if inputs.runs_reference:  # the policy's states, kept while the reference runs
        layer, loss = layer + hidden, loss + hidden
    parts = {"layer workspace": layer} if layer > loss else {"loss workspace": loss}
    if not inputs.has_teacher:
        return parts
    batches = limits.TEACHER_BATCHES if inputs.distill.teacher.placement == "streamed" else 1
    phases = [parts, _teacher_pass(inputs, tokens)] if inputs.runs_teacher else [parts]
    widest = max(phases, key=lambda phase: sum({"teacher": teacher, **phase}.values()))
    return {**widest, "teacher's signal": signal_bytes(inputs, batches * tokens)}


def signal_bytes(inputs: PlanInputs, tokens: int) -> float:
    """Return the bytes of a teacher's targets: final hidden states, or a sample of its probabilities."""
    if inputs.teacher_is_sampled:
        return float(tokens * (inputs.distill.top_k + inputs.distill.num_samples) * _SAMPLED_BYTES)
    width = (inputs.teacher_shape or inputs.shape)["hidden_size"]
    return float(tokens * width * DTYPE_BYTES[inputs.distill.teacher.dtype])


def teacher_bytes(inputs: PlanInputs) -> float | None:
    """Return the bytes of a teacher's weights per rank, without those that it shares with the student.

    Returns: 0 if no teacher is loaded; None if its shape is unknown without a download.
    """
    teacher, shape = inputs.distill.teacher, inputs.teacher_shape
    if not inputs.has_teacher or inputs.teacher_is_sampled:
        return 0.0
    if shape is None:
        return None
    table = shape["vocab_size"] * shape["hidden_size"] * DTYPE_BYTES[teacher.dtype]
    shared = shape is inputs.shape and teacher.dtype == inputs.model.dtype
    if teacher.placement in ("cached", "streamed"):  # hidden states, to which the head is applied
        return 0.0 if shared else table
    tables = 0 if shared else table * (1 if shape.get("tie_word_embeddings") else 2)
    return shape["num_hidden_layers"] * _teacher_layer_bytes(inputs, shape) + tables


def streamed_bytes(inputs: PlanInputs) -> float:
    """Return the bytes of the two layers that a streamed teacher has in memory while it runs; else 0."""
    shape = inputs.teacher_shape
    if shape is None or not inputs.runs_teacher or inputs.distill.teacher.placement != "streamed":
        return 0.0
    return 2 * _teacher_layer_bytes(inputs, shape)


def _teacher_layer_bytes(inputs: PlanInputs, shape: Mapping[str, Any]) -> float:
    return sum(map(math.prod, linear_shapes(shape).values())) * DTYPE_BYTES[inputs.distill.teacher.dtype]
