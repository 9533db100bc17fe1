"""The plan as text: for `--dry-run` and for the first log lines of a run."""

from __future__ import annotations

import os

from finetune.config.compose import to_yaml
from finetune.config.schema import RunConfig
from finetune.models.families import shape_of
from finetune.planning.advice import changes_that_fit
from finetune.planning.auto_batch import estimate_memory, free_memory, largest_micro_batch
from finetune.planning.inputs import PlanInputs, plan_inputs
from finetune.planning.peak_memory import streamed_bytes, teacher_bytes
from finetune.system.format import format_bytes
from finetune.system.machine import device_type_here, ranks_of_run


def describe_plan(inputs: PlanInputs, free_bytes: float | None = None) -> str:
    """Return the plan as lines of text, with a WARNING and changes that help if the run does not fit."""
    train = inputs.train
    lines = [
        f"batch: sequences={train.batch_size}, max_length={inputs.data.max_length}, ranks={inputs.ranks}, "
        f"micro_batch={largest_micro_batch(inputs)}",
        f"length: {f'steps={train.max_steps}' if train.max_steps else f'epochs={train.epochs or 1:g}'}",
    ]
    if not inputs.shape:
        return "\n".join([*lines, f"model: the sizes of {inputs.model.name} are unknown, so memory is not planned"])
    found, teacher = estimate_memory(inputs, free_bytes), describe_teacher(inputs)
    static, activations = found.static, found.activations
    kept, recomputed = (activations.peak_bytes(n) for n in (0, max(0, len(activations.kept) - 1)))
    largest = sorted(found.parts.items(), key=lambda part: -part[1])[:3]
    most = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest)
    lines += [
        f"model: parameters={static.parameters:,}, trained={static.trained:,} "
        f"({static.trained / static.parameters:.3%})",
        f"memory before activations: {format_bytes(static.total_bytes)} per rank "
        f"({', '.join(f'{name} {format_bytes(size)}' for name, size in static.parts.items())})",
        *([teacher] if teacher else []),
        f"memory of activations: {format_bytes(kept)} per rank if no layer is recomputed, "
        f"{format_bytes(recomputed)} if all are (train.gradient_checkpointing={train.gradient_checkpointing})",
        f"predicted peak: {format_bytes(found.peak_bytes)} per rank, {found.moment}, "
        f"recomputed_layers={found.recomputed}, micro_batch={found.micro_batch} (most of it: {most})",
    ]
    if free_bytes is not None and found.needed_bytes > free_bytes:
        needed, free = format_bytes(found.needed_bytes), format_bytes(free_bytes)
        lines.append(f"WARNING: the run needs {needed} with a margin, {free} is free")
        lines += (f"  {change}" for change in changes_that_fit(inputs, free_bytes))
    return "\n".join(lines)


def describe_teacher(inputs: PlanInputs) -> str | None:
    """Return a line about the teacher and its memory; None for a run without one."""
    if not inputs.has_teacher:
        return None
    teacher, cache = inputs.distill.teacher, inputs.distill.cache
    name = teacher.name or f"{inputs.model.name} itself, in {teacher.dtype}"
    if teacher.placement == "cached":
        return f"teacher: {name}, not loaded; its targets are read from {cache}"
    if teacher.placement == "server":
        served = teacher.served_as or teacher.name or "the model"
        return f"teacher: {served} at {teacher.url}; its targets go to {cache}"
    size = teacher_bytes(inputs)
    if size is None:
        return f"teacher: {name}, {teacher.placement}; its sizes are unknown, so its memory is not planned"
    parts = "weights that it does not share with the student"
    if teacher.placement == "streamed":
        size, parts = size + streamed_bytes(inputs), "two layers, and its head if the student has another one"
    return f"teacher: {name}, {teacher.placement}: {format_bytes(size)} per rank for {parts}"


def dry_run(cfg: RunConfig) -> str:
    """Return the resolved YAML and, as comments, the plan. Nothing is loaded or written."""
    device_type = device_type_here()
    inputs = plan_inputs(cfg, shape_of(cfg.model.name), device_type=device_type, ranks=ranks_of_run(os.environ))
    plan = describe_plan(inputs, free_memory(device_type))
    return "\n".join([to_yaml(cfg).rstrip(), "", *(f"# {line}" for line in plan.splitlines())])
