"""What a teacher takes beside the student, by where it is and by what it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.config.schema import RunConfig
from finetune.models.families import shape_of
from finetune.planning.static_memory import DTYPE_BYTES, linear_shapes
from finetune.system.format import format_bytes

_SAMPLED_BYTES = 8 + 4  # losses/signal.py: a token's number and its probability


def teaches_steps(cfg: RunConfig) -> bool:
    """Whether training steps ask the teacher: those of a distilling run, or a guard's recovery."""
    return cfg.distill.objective != "none" or recovers(cfg)


def recovers(cfg: RunConfig) -> bool:
    """Whether a guard may train from the teacher alone for some steps."""
    return cfg.guard.max is not None and cfg.guard.action == "recover"


def computes_here(cfg: RunConfig) -> bool:
    """Whether the teacher's layers run beside the student's, or its signal comes from elsewhere."""
    return cfg.asks_teacher and cfg.distill.teacher.placement in ("resident", "streamed")


def gives_sample(cfg: RunConfig) -> bool:
    """Whether the signal is some probabilities of each target, or the hidden states that make all of them."""
    placement = cfg.distill.teacher.placement
    return placement == "server" or (placement == "cached" and cfg.distill.cache_kind == "sampled")


def teacher_shape(cfg: RunConfig, student: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Keys as in config.json, the student's for a teacher of its base; None if not known without a download."""
    name = cfg.distill.teacher.name
    return student if name in (None, cfg.model.name) else shape_of(str(name))


def signal_bytes(cfg: RunConfig, student: Mapping[str, Any], tokens: int) -> float:
    """What the teacher says of so many targets: their final hidden states, or a sample of their probabilities."""
    if gives_sample(cfg):
        return float(tokens * (cfg.distill.top_k + cfg.distill.num_samples) * _SAMPLED_BYTES)
    width = (teacher_shape(cfg, student) or student)["hidden_size"]
    return float(tokens * width * DTYPE_BYTES[cfg.distill.teacher.dtype])


def teacher_bytes(cfg: RunConfig, student: Mapping[str, Any]) -> float | None:
    """Weights of a teacher that one rank keeps, without those that a student of the same base and type has too.

    student: shape of the student, keys as in config.json. Returns: 0 where no teacher is loaded, None where the
    teacher's shape is not known without a download.
    """
    teacher = cfg.distill.teacher
    if not cfg.asks_teacher or gives_sample(cfg):
        return 0.0
    shape = teacher_shape(cfg, student)
    if shape is None:
        return None
    width = DTYPE_BYTES[teacher.dtype]
    table = shape["vocab_size"] * shape["hidden_size"] * width
    shared = shape is student and teacher.dtype == cfg.model.dtype
    if teacher.placement in ("cached", "streamed"):  # hidden states, which a head makes logits of
        return 0.0 if shared else table
    tables = 0 if shared else table * (1 if shape.get("tie_word_embeddings") else 2)
    return shape["num_hidden_layers"] * _layer_bytes(cfg, shape) + tables


def passing_bytes(cfg: RunConfig, student: Mapping[str, Any]) -> float:
    """The two layers that a streamed teacher has in memory while it is asked; 0 for any other, or an unknown one."""
    shape = teacher_shape(cfg, student)
    if shape is None or not computes_here(cfg) or cfg.distill.teacher.placement != "streamed":
        return 0.0
    return 2 * _layer_bytes(cfg, shape)


def _layer_bytes(cfg: RunConfig, shape: Mapping[str, Any]) -> float:
    return sum(out * inputs for out, inputs in linear_shapes(shape).values()) * DTYPE_BYTES[cfg.distill.teacher.dtype]


def describe_teacher(cfg: RunConfig, student: Mapping[str, Any]) -> str | None:
    """A line for the plan; None for a run without a teacher."""
    if not cfg.asks_teacher:
        return None
    teacher = cfg.distill.teacher
    name = teacher.name or f"{cfg.model.name} itself, in {teacher.dtype}"
    match teacher.placement:
        case "cached":
            return f"teacher: {name}, not loaded; its signal is read from {cfg.distill.cache}"
        case "server":
            served = teacher.served_as or teacher.name or "what is served"
            return f"teacher: {served} at {teacher.url}; its signal goes to {cfg.distill.cache}"
    size = teacher_bytes(cfg, student)
    if size is None:
        return f"teacher: {name}, {teacher.placement}; its shapes are not known here, so its memory is not planned"
    how = "weights beside the student's"
    if teacher.placement == "streamed":
        size, how = size + passing_bytes(cfg, student), "two layers and, where the student has none to share, the head"
    return f"teacher: {name}, {teacher.placement}: {format_bytes(size)} a rank for {how}"
