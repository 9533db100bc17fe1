"""The highest memory that a run will reach on one rank, by part and by the moment at which it is reached.

On CUDA what the allocator hands out (`torch.cuda.max_memory_allocated`); on a CPU what is resident of the process, its
libraries and the pages of mapped weight files included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.planning.activations import ActivationPlan, evaluation_bytes, forward_bytes, plan_activations
from finetune.planning.static_memory import DTYPE_BYTES, MemoryPlan, linear_shapes, static_of
from finetune.planning.teacher import (
    computes_here,
    passing_bytes,
    recovers,
    signal_bytes,
    teacher_bytes,
    teacher_shape,
    teaches_steps,
)
from finetune.system import machine

MIB = 2**20
# Resident with every library imported, before a model is there: 341 MiB of the process's own and 104 MiB of pages of
# shared libraries, measured with CPython 3.11, torch 2.13 (CPU build), transformers 5.23, peft 0.21 on Linux.
_PROCESS_BYTES = 445 * MIB
# What comes besides once a run goes on, whatever it is: 44 MiB for modules and library pages of first use, and 45 that
# the heap of glibc holds free, thread caches and buffers of oneDNN (measured with a tokenizer of 46 kB).
_HEAP_BYTES = (44 + 45) * MIB
# oneDNN makes code for every new shape of a bf16 product, half a megabyte of heap for each, and keeps 1,024 of them. A
# step's targets, a batch of an evaluation, and a word of an answer are such shapes. How often a new one comes up was
# measured, not derived: the embedded base took 66, 100 and 173 MiB more by step 12, 60 and 400 than by step 2, two
# layers of 0.5B 55 by step 60; the first evaluation took 60 more, answering 20 rows 34 and 200 rows 70.
_CODE_BY_STEP, _CODE_STEPS = 22 * MIB, 400
_CODE_OF_EVALUATION = 60 * MIB
_CODE_OF_ANSWERS, _CODE_BY_ANSWER, _CODE_ANSWERS = 30 * MIB, 0.2 * MIB, 200
# A read of a mapped file brings in so many bytes around it (Linux, fault_around_bytes).
_FAULT_AROUND = 65536
# Two tokenizers (the run's, the adapter's) in memory, over the bytes of tokenizer.json: 172 MiB for Qwen2.5's 11.4 MB,
# and 65 that reading it leaves free in the heap (measured: 129 MiB are free there after loading, 10 with a small one).
_TOKENIZER_SHARE = 21.8
_QWEN_TOKENIZER_BYTES = 11_421_789
# A CUDA context with the libraries' kernels, outside the allocator; not measured by this package, 0.4 to 0.6 GB are
# usual. Taken from a device's memory, never part of a predicted peak.
CONTEXT_BYTES = 512 * MIB
# Added to what is not weights before a run is said to fit: how far predictions are off, and on a GPU, where no figures
# are there yet, blocks that the allocator cannot reuse.
MARGIN = {"cuda": 0.18, "cpu": 0.10}
# training/measuring.py evaluates so many tokens at a time, or a sequence; evaluation/agreement.py asks a teacher that
# is read layer by layer about so many of these batches at once.
EVALUATED_TOKENS, EVALUATED_BATCHES = 4096, 16


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one rank. moments: by name, what is held then, by part. activations: of the micro-batch planned for.

    teacher_unknown: a teacher is loaded whose shapes are not known, so it is not counted.
    """

    device_type: str
    static: MemoryPlan
    activations: ActivationPlan
    micro_batch: int
    recomputed: int
    moments: Mapping[str, Mapping[str, float]]
    teacher_unknown: bool = False

    @property
    def moment(self) -> str:
        """When the peak is reached."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Mapping[str, float]:
        """What is held at the peak."""
        return self.moments[self.moment]

    @property
    def peak_bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> float:
        """What must be free for the run to be safe: at each moment what is held, a margin on what is not weights, and
        on a GPU the context.
        """
        return max(self._needed(parts) for parts in self.moments.values())

    def _needed(self, parts: Mapping[str, float]) -> float:
        fixed = sum(size for name, size in parts.items() if name in self.static.parts or name in _FIXED)
        margin = 1 + MARGIN[_kind(self.device_type)]
        return fixed + margin * (sum(parts.values()) - fixed) + (CONTEXT_BYTES if self.device_type == "cuda" else 0)

    def usable_bytes(self, free_bytes: float) -> float:
        """What the activations of a training step may take of so many free bytes: those with which they need no more.

        Of any footprint of a config: it does not depend on what is recomputed.
        """
        step = self.moments[_MOMENTS["backward"]]
        beside = {name: size for name, size in step.items() if name not in _ACTIVATIONS}
        return max(0.0, (free_bytes - self._needed(beside)) / (1 + MARGIN[_kind(self.device_type)]))


_FIXED = {"process and libraries", "tokenizers", "teacher"}
_ACTIVATIONS = {
    "inputs of recomputed layers",
    "activations kept",
    "layer workspace",
    "loss workspace",
    "holes in the heap",
}


def predict(
    cfg: RunConfig,
    shape: Mapping[str, Any],
    device_type: str,
    micro_batch: int,
    recomputed: int,
    *,
    ranks: int = 1,
    document_tokens: int | None = None,
) -> Footprint:
    """The footprint with so many sequences a forward pass and so many recomputed layers.

    shape: keys as in config.json. document_tokens: as for `plan_activations`.
    """
    static = static_of(cfg, shape)
    activations = plan_activations(shape, cfg, micro_batch, device_type, document_tokens)
    offload = cfg.train.gradient_checkpointing == "offload" and device_type == "cuda"
    teacher = teacher_bytes(cfg, shape)
    # A GPU keeps buffers for a streamed teacher's layers; a CPU maps them from their files while it is asked.
    buffers = passing_bytes(cfg, shape) if device_type == "cuda" else 0.0
    held = _held(cfg, static, (teacher or 0.0) + buffers, device_type, ranks)
    if device_type != "cuda" and "embedding" in held:
        held["embedding"] = _touched(cfg, held["embedding"])
    moments, lesson = {"loading": _loading(cfg, shape, held)}, _lesson(cfg, shape, static, micro_batch, ranks)
    for name, parts in activations.moments(recomputed, offload).items():
        moments[_MOMENTS[name]] = {**held, **lesson, **parts}
    if lesson and computes_here(cfg):
        asking = _asking(cfg, shape, micro_batch * cfg.data.max_length, device_type)
        moments["asking the teacher"] = {**held, **lesson, **asking}
    if cfg.data.eval or cfg.data.held_out:
        moments["evaluation"] = {**held, **_evaluation(cfg, shape, held["teacher"], device_type)}
    gradients = {"gradients": static.parts.get("gradients", 0.0)}
    # torch updates all parameters at once on CUDA, one after the other on a CPU.
    update = gradients["gradients"] * (2 if device_type == "cuda" else 0)
    moments["optimizer step"] = {**held, **gradients, "update of the weights": update}
    moments = {name: {part: size for part, size in parts.items() if size} for name, parts in moments.items()}
    return Footprint(device_type, static, activations, micro_batch, recomputed, moments, teacher is None)


_MOMENTS = {
    "loss": "training step, at the loss",
    "backward": "training step, as backward begins",
    "forward": "training step, as the forward pass ends",
    "recomputing": "training step, while a layer is recomputed",
}


def _held(cfg: RunConfig, static: MemoryPlan, teacher: float, device_type: str, ranks: int) -> dict[str, float]:
    """What is there all the time once training runs."""
    held = {name: size for name, size in static.parts.items() if name != "gradients"}
    held["teacher"] = teacher
    if ranks > 1:
        held["gradients exchanged between ranks"] = static.parts.get("gradients", 0.0)
    if device_type != "cuda":
        held["process and libraries"] = _PROCESS_BYTES
        held["tokenizers"] = _TOKENIZER_SHARE * _tokenizer_bytes(cfg)
        held["allocator slack"] = _HEAP_BYTES
        held["code for shapes"] = _code_for_shapes(cfg)
    return held


def _code_for_shapes(cfg: RunConfig) -> float:
    """What a CPU's products keep of the shapes that they have met, beyond those of two steps, which the slack has."""
    if cfg.model.dtype != "bfloat16" or not machine.has_bf16_products():
        return 0.0
    steps = min(cfg.train.max_steps or _CODE_STEPS, _CODE_STEPS)
    size = _CODE_BY_STEP * math.log(max(1.0, steps / 2))
    if cfg.data.eval or cfg.data.held_out:
        size += _CODE_OF_EVALUATION
    if rows := cfg.generation.num_examples:
        size += _CODE_OF_ANSWERS + _CODE_BY_ANSWER * min(rows, _CODE_ANSWERS)
    return size


def _touched(cfg: RunConfig, table_bytes: float) -> float:
    """Of an untied embedding that is mapped from its file, the pages that the run's tokens can touch."""
    if cfg.train.max_steps is None or cfg.lora.new_tokens or "embed_tokens" in cfg.lora.modules_to_save:
        return table_bytes
    tokens = cfg.train.max_steps * cfg.train.batch_size * cfg.data.max_length
    return min(table_bytes, float(tokens * _FAULT_AROUND))


def _loading(cfg: RunConfig, shape: Mapping[str, Any], held: Mapping[str, float]) -> dict[str, float]:
    """The base with one matrix in 16 bit; the optimizer and the slack of training are not there yet."""
    largest = max(out * inputs for out, inputs in linear_shapes(shape).values())
    parts = {name: size for name, size in held.items() if name != "optimizer"}
    if cfg.quant.type == "nf4":
        parts["a matrix before it is quantized"] = largest * DTYPE_BYTES[cfg.model.dtype]
    return parts


def _lesson(
    cfg: RunConfig, shape: Mapping[str, Any], static: MemoryPlan, micro_batch: int, ranks: int
) -> dict[str, float]:
    """What training steps that ask a teacher hold besides: its signal, and a recovery's own moments."""
    if not teaches_steps(cfg):
        return {}
    streamed = cfg.distill.teacher.placement == "streamed"
    # One that is read layer by layer answers all of a rank's sequences in one pass, of several steps if it is told to.
    passes = math.ceil(cfg.train.batch_size / ranks) * cfg.distill.teacher.steps_ahead if streamed else micro_batch
    parts = {"teacher's signal": signal_bytes(cfg, shape, passes * cfg.data.max_length)}
    if recovers(cfg):
        parts["optimizer of a recovery"] = static.parts.get("optimizer", 0.0)
    return parts


def _asking(cfg: RunConfig, shape: Mapping[str, Any], tokens: int, device_type: str) -> dict[str, float]:
    """What a teacher that computes here takes over so many tokens, where it is not what it always takes."""
    taught = teacher_shape(cfg, shape) or shape
    parts = {"layer workspace": forward_bytes(taught, cfg, tokens, in_blocks=device_type == "cpu")}
    if device_type == "cpu" and (passing := passing_bytes(cfg, shape)):
        # Its head, which is mapped as they are, leaves the memory to its layers.
        parts["teacher"] = passing
    return parts


def _evaluation(cfg: RunConfig, shape: Mapping[str, Any], teacher: float, device_type: str) -> dict[str, float]:
    """What scoring held-out rows holds, the comparison with a teacher included. teacher: what it always takes."""
    tokens = max(EVALUATED_TOKENS, cfg.data.max_length)
    parts = evaluation_bytes(shape, cfg, tokens, device_type)
    if not cfg.asks_teacher:
        return parts
    batches = EVALUATED_BATCHES if cfg.distill.teacher.placement == "streamed" else 1
    phases = [parts, _asking(cfg, shape, tokens, device_type)] if computes_here(cfg) else [parts]
    widest = max(phases, key=lambda phase: sum({"teacher": teacher, **phase}.values()))
    return {**widest, "teacher's signal": signal_bytes(cfg, shape, batches * tokens)}


def _tokenizer_bytes(cfg: RunConfig) -> int:
    file = Path(cfg.model.tokenizer or cfg.model.name).expanduser() / "tokenizer.json"
    return file.stat().st_size if file.is_file() else _QWEN_TOKENIZER_BYTES


def _kind(device_type: str) -> str:
    return "cuda" if device_type == "cuda" else "cpu"
