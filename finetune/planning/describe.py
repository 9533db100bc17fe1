"""The plan as text: all of it for `--dry-run` and `--verbose`, and the part that every run logs first."""

from __future__ import annotations

import os
from dataclasses import replace

from finetune.config.compose import to_yaml
from finetune.config.schema import RunConfig
from finetune.models.families import shape_of
from finetune.planning.advice import changes_that_fit
from finetune.planning.auto_batch import (
    estimate_memory,
    free_memory,
    host_shortage,
    keep_copies,
    largest_micro_batch,
)
from finetune.planning.communication import describe_sent, sent_bytes
from finetune.planning.inputs import PlanInputs, plan_inputs
from finetune.planning.peak_memory import PeakMemory, streamed_bytes, teacher_bytes
from finetune.planning.sampling import sampled_batch
from finetune.planning.sharded_base import shard_group
from finetune.planning.static_memory import trained_in_tower
from finetune.system.accelerator import device_type_here
from finetune.system.format import format_bytes
from finetune.system.machine import nodes_of_run, ranks_of_run


def describe_plan(inputs: PlanInputs, free_bytes: float | None = None) -> str:
    """Return the plan as lines of text, with a WARNING and changes that help if the run does not fit."""
    train = inputs.train
    lines = [
        f"batch: sequences={train.batch_size}, max_length={inputs.data.max_length}, ranks={inputs.ranks}, "
        f"micro_batch={largest_micro_batch(inputs)}",
        f"length: {f'steps={train.max_steps}' if train.max_steps else f'epochs={train.epochs or 1:g}'}",
    ]
    if not inputs.shape:
        return "\n".join([*lines, describe_start(inputs)])
    found = estimate_memory(inputs, free_bytes)
    static, activations = found.static, found.activations
    kept, recomputed = (activations.peak_bytes(n) for n in (0, max(0, len(activations.kept) - 1)))
    largest = sorted(found.parts.items(), key=lambda part: -part[1])[:3]
    most = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest)
    lines += [
        _model_line(found),
        *tower_lines(inputs),
        f"memory before activations: {format_bytes(static.total_bytes)} per rank "
        f"({', '.join(f'{name} {format_bytes(size)}' for name, size in static.parts.items())})",
        *_teacher_lines(inputs),
        *_sampling_lines(inputs, found),
        *_rank_lines(inputs, found),
        f"memory of activations: {format_bytes(kept)} per rank if no layer is recomputed, "
        f"{format_bytes(recomputed)} if all are (train.gradient_checkpointing={train.gradient_checkpointing})",
        f"predicted peak: {format_bytes(found.peak_bytes)} per rank, {found.moment}, "
        f"recomputed_layers={found.recomputed}, micro_batch={found.micro_batch} (most of it: {most})",
    ]
    if found.host_bytes:
        lines.append(f"main memory: {format_bytes(found.host_bytes)} per rank for what is kept there")
    return "\n".join([*lines, *_shortage_lines(inputs, found, free_bytes)])


def describe_start(inputs: PlanInputs, free_bytes: float | None = None) -> str:
    """Return the lines of the plan that every run logs: its model, its teacher, and a WARNING if it does not fit."""
    if not inputs.shape:
        return f"model: the sizes of {inputs.model.name} are unknown, so memory is not planned"
    found = estimate_memory(inputs, free_bytes)
    lines = [_model_line(found), *tower_lines(inputs), *_teacher_lines(inputs), *_sampling_lines(inputs, found)]
    lines += _rank_lines(inputs, found)
    return "\n".join([*lines, *_shortage_lines(inputs, found, free_bytes)])


def _model_line(found: PeakMemory) -> str:
    parameters, trained = found.static.parameters, found.static.trained
    return f"model: parameters={parameters:,}, trained={trained:,} ({trained / parameters:.3%})"


def tower_lines(inputs: PlanInputs) -> list[str]:
    """Return a line about the towers of a model that reads media: their sizes, and when they run."""
    towers = []
    for name, tower in inputs.towers.items():
        trained = trained_in_tower(tower, inputs.lora)
        state = f"adapter {trained:,}" if trained else "frozen"
        towers.append(f"{name} tower {tower.parameters:,} parameters ({state})")
    when = "run in each step" if inputs.towers_stay else "read every file once before training"
    return [f"media: {', '.join(towers)}; {when}"] if towers else []


def _teacher_lines(inputs: PlanInputs) -> list[str]:
    teacher = describe_teacher(inputs)
    return [teacher] if teacher else []


def _sampling_lines(inputs: PlanInputs, found: PeakMemory) -> list[str]:
    """Return a line about the batches in which answers are sampled, if they are."""
    if not inputs.samples_answers:
        return []
    batch, size = sampled_batch(inputs), sum(found.moments["sampling answers"].values())
    line = f"sampling: answers={batch.count} at a time, up to {batch.tokens} tokens with prompt, {format_bytes(size)}"
    kept = found.static.parts.get("16-bit copies of 4-bit linears")
    return [line if kept is None else f"{line} ({format_bytes(kept)} of them 16-bit copies of 4-bit weights)"]


def _rank_lines(inputs: PlanInputs, found: PeakMemory) -> list[str]:
    """Return a line about who holds the base and what each rank sends in a step; nothing for a single rank."""
    if inputs.ranks == 1:
        return []
    copies = f"base_split_over={inputs.shard_ranks}, " if inputs.shard_ranks > 1 else ""
    sent = describe_sent(sent_bytes(inputs, found.micro_batch))
    return [f"ranks: {inputs.ranks}, nodes={inputs.nodes}, {copies}sent per rank and step: {sent}"]


def _shortage_lines(inputs: PlanInputs, found: PeakMemory, free_bytes: float | None) -> list[str]:
    """Return WARNINGs, and the changes that help, if the run does not fit, else nothing."""
    host = host_shortage(found)
    lines = [] if host is None else [host]
    if free_bytes is None or found.needed_bytes <= free_bytes:
        return lines
    needed, free = format_bytes(found.needed_bytes), format_bytes(free_bytes)
    changes = (f"  {change}" for change in changes_that_fit(inputs, free_bytes))
    return [*lines, f"WARNING: the run needs {needed} with a margin, {free} is free", *changes]


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


def dry_run(cfg: RunConfig, verbose: bool = False) -> str:
    """Return the settings as YAML and, as comments, the plan. Nothing is loaded or written.

    verbose: with the settings that have their default value.
    """
    device_type = device_type_here()
    ranks, nodes = ranks_of_run(os.environ), nodes_of_run(os.environ)
    inputs = plan_inputs(cfg, shape_of(cfg.model.name), device_type=device_type, ranks=ranks, nodes=nodes)
    free = free_memory(device_type)
    inputs = replace(inputs, shard_ranks=shard_group(inputs, free))
    plan = describe_plan(keep_copies(inputs, free), free)
    return "\n".join(
        [to_yaml(cfg, changed_only=not verbose).rstrip(), "", *(f"# {line}" for line in plan.splitlines())]
    )
