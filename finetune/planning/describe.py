"""What a run will do and hold, in words: for `--dry-run` and for the first lines of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from finetune.config.compose import to_yaml
from finetune.config.schema import RunConfig
from finetune.models.families import shape_of
from finetune.planning.advice import changes_that_fit, describe_change
from finetune.planning.auto_batch import derive_micro_batch, foresee, free_memory
from finetune.planning.peak_memory import Footprint
from finetune.planning.teacher import describe_teacher
from finetune.system.format import format_bytes
from finetune.system.machine import device_type_here, ranks_of_run


def describe_plan(
    cfg: RunConfig, shape: Mapping[str, Any] | None, ranks: int, device_type: str, free_bytes: float | None = None
) -> str:
    """The plan as lines of text, with a WARNING and what to change where it does not fit.

    shape: None when the model's numbers are not known without a download. free_bytes: as for `foresee`.
    """
    micro = derive_micro_batch(cfg, ranks, device_type)
    lines = [
        f"batch: {cfg.train.batch_size} sequences of up to {cfg.data.max_length} tokens a step, "
        f"{ranks} rank(s), {micro} a forward pass",
        f"length: {f'{cfg.train.max_steps} steps' if cfg.train.max_steps else f'{cfg.train.epochs or 1:g} epoch(s)'}",
    ]
    if shape is None:
        return "\n".join(
            [*lines, f"model: the shapes of {cfg.model.name} are not known here, so memory is not planned"]
        )
    found = foresee(cfg, shape, ranks, device_type, free_bytes)
    static, teacher = found.static, describe_teacher(cfg, shape)
    activations = found.activations
    kept, recomputed = (activations.peak_bytes(n) for n in (0, max(0, len(activations.kept) - 1)))
    lines += [
        f"model: {static.parameters:,} parameters, {static.trained:,} trained "
        f"({static.trained / static.parameters:.3%})",
        f"memory before activations: {format_bytes(static.total_bytes)} a rank "
        f"({', '.join(f'{name} {format_bytes(size)}' for name, size in static.parts.items())})",
        *([teacher] if teacher else []),
        f"memory of activations: {format_bytes(kept)} a rank when no layer is recomputed, "
        f"{format_bytes(recomputed)} when all are (train.gradient_checkpointing={cfg.train.gradient_checkpointing})",
        f"predicted peak: {format_bytes(found.peak_bytes)} a rank, {found.moment}, "
        f"with {found.recomputed or 'no'} layer(s) recomputed and {found.micro_batch} sequence(s) a forward pass "
        f"(most of it: {_largest_parts(found)})",
    ]
    if free_bytes is not None and found.needed_bytes > free_bytes:
        lines.append(
            f"WARNING: {format_bytes(found.needed_bytes)} are needed with a margin, {format_bytes(free_bytes)} are free"
        )
        lines += map(describe_change, changes_that_fit(cfg, shape, ranks, device_type, free_bytes))
    return "\n".join(lines)


def _largest_parts(found: Footprint) -> str:
    """The three largest parts of the peak: for a small model, those are not the model's."""
    largest = sorted(found.parts.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in largest)


def dry_run(cfg: RunConfig) -> str:
    """The resolved YAML and, as comments, the plan; nothing is loaded, nothing is written."""
    ranks, device_type = ranks_of_run(os.environ), device_type_here()
    plan = describe_plan(cfg, shape_of(cfg.model.name), ranks, device_type, free_memory(device_type))
    return "\n".join([to_yaml(cfg).rstrip(), "", *(f"# {line}" for line in plan.splitlines())])
