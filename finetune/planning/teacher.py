"""Bytes that a teacher takes beside the student, by where it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.config.schema import RunConfig
from finetune.models.families import shape_of
from finetune.planning.memory import DTYPE_BYTES, linear_shapes


def teacher_bytes(cfg: RunConfig, student: Mapping[str, Any]) -> float | None:
    """Weights of the teacher on one rank; without those that it shares with a student of the same base and type.

    student: shape of the student, keys as in config.json. Returns: 0 where no teacher is loaded, None where the
    teacher's shape is not known without a download.
    """
    teacher = cfg.distill.teacher
    if cfg.distill.objective == "none" or teacher.placement in ("cached", "server"):
        return 0.0
    own = teacher.name in (None, cfg.model.name)
    shape = student if own else shape_of(str(teacher.name))
    if shape is None:
        return None
    width = DTYPE_BYTES[teacher.dtype]
    table = shape["vocab_size"] * shape["hidden_size"]
    layer = sum(out * inputs for out, inputs in linear_shapes(shape).values())
    shared = own and teacher.dtype == cfg.model.dtype
    if teacher.placement == "streamed":
        # Embedding rows are read as they are needed; a tied table is the head.
        return (2 * layer + (0 if shared else table)) * width
    tables = 0 if shared else table * (1 if shape.get("tie_word_embeddings") else 2)
    return (shape["num_hidden_layers"] * layer + tables) * width


def describe_teacher(cfg: RunConfig, student: Mapping[str, Any]) -> str | None:
    """A line for the plan; None for a run without a teacher."""
    if cfg.distill.objective == "none":
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
    how = "two layers and the head of it" if teacher.placement == "streamed" else "weights beside the student's"
    return f"teacher: {name}, {teacher.placement}: {size / 2**30:.2f} GiB a rank for {how}"
