"""What a run will do and hold, in words: for `--dry-run` and for the first lines of a run; and what it does to fit."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.compose import to_yaml
from finetune.config.schema import RunConfig
from finetune.models.families import shape_of
from finetune.planning.activations import ActivationPlan, plan_activations
from finetune.planning.footprint import Footprint, predict, usable_bytes
from finetune.planning.machine import available_memory, device_memory, device_type_here
from finetune.planning.teacher import describe_teacher

# Tokens of a forward pass from which more of them are no faster: on a CPU the products are as fast by then, and every
# token more only raises the peak.
_ENOUGH_TOKENS = {"cpu": 2048}
_ENOUGH_ON_A_GPU = 8192


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """What a run does to fit: sequences a forward pass, `train.recompute` with auto decided, and both in words.

    recomputed: how many layers that is.
    """

    micro_batch: int
    recompute: str | int
    text: str
    recomputed: int = 0


def derive_micro_batch(cfg: RunConfig, ranks: int, device_type: str) -> int:
    """Sequences a forward pass on one rank: as given, or as many as make it fast, at least one.

    device_type: of torch's devices. Memory may make it fewer: see `choose_memory`.
    """
    per_rank = max(1, cfg.train.batch_size // ranks)
    if cfg.train.micro_batch_size is not None:
        return min(cfg.train.micro_batch_size, per_rank)
    return max(1, min(per_rank, _ENOUGH_TOKENS.get(device_type, _ENOUGH_ON_A_GPU) // cfg.data.max_length))


def choose_memory(
    cfg: RunConfig, shape: Mapping[str, Any], ranks: int, device_type: str, free_bytes: float | None
) -> MemoryChoice:
    """The fewest recomputed layers, then the largest micro-batch, that fit into so many bytes beside the model.

    free_bytes: what activations may take; None where it is not known. `train.micro_batch_size` and a `train.recompute`
    that is not auto stay as they are given; what nothing makes fit is tried all the same, and said.
    """
    micro = derive_micro_batch(cfg, ranks, device_type)
    if free_bytes is None:
        recompute = "all" if cfg.train.recompute == "auto" else cfg.train.recompute
        plan = plan_activations(shape, cfg, micro, device_type)
        words = f"recompute: {recompute} (the free memory is not known here)"
        return MemoryChoice(micro, recompute, words, recomputed_layers_of(cfg, plan, 0.0))
    wanted = micro
    plan = plan_activations(shape, cfg, micro, device_type)
    while _least_peak(cfg, plan, device_type) > free_bytes and micro > 1 and cfg.train.micro_batch_size is None:
        micro //= 2
        plan = plan_activations(shape, cfg, micro, device_type)
    count = recomputed_layers_of(cfg, plan, free_bytes)
    recompute = count if cfg.train.recompute == "auto" and count else "none"
    if cfg.train.recompute != "auto":
        recompute = cfg.train.recompute
    return MemoryChoice(micro, recompute, _words(cfg, plan, count, wanted, micro, device_type, free_bytes), count)


def recomputed_layers_of(cfg: RunConfig, plan: ActivationPlan, free_bytes: float = math.inf) -> int:
    """Layers that a setting recomputes; for auto, as many as it takes."""
    setting, reached = cfg.train.recompute, len(plan.kept)
    if setting == "auto":
        return plan.fewest(free_bytes)
    if isinstance(setting, int):
        return min(setting, reached)
    return 0 if setting == "none" else max(0, reached - 1)


def foresee(
    cfg: RunConfig, shape: Mapping[str, Any], ranks: int, device_type: str, free_bytes: float | None
) -> tuple[Footprint, MemoryChoice]:
    """The footprint of a run that finds so many bytes of its device free before it loads, and what it does to fit.

    free_bytes: on a CPU beside what this process holds already, which the prediction counts as its own.
    """
    micro = derive_micro_batch(cfg, ranks, device_type)
    beside = predict(cfg, shape, device_type, micro, 0, ranks=ranks)
    choice = choose_memory(cfg, shape, ranks, device_type, None if free_bytes is None else usable_bytes(beside, free_bytes))
    found = predict(cfg, shape, device_type, choice.micro_batch, choice.recomputed, ranks=ranks)
    return found, choice


def free_memory(device_type: str) -> float | None:
    """Bytes that are free on this rank's device; None where nobody can tell without starting it."""
    if device_type == "cuda":
        found = device_memory()
        return None if found is None else float(found.free_bytes)
    return None if (free := available_memory()) is None else float(free)


def _offloads(cfg: RunConfig, device_type: str) -> bool:
    return cfg.train.recompute == "offload" and device_type != "cpu"


def _least_peak(cfg: RunConfig, plan: ActivationPlan, device_type: str) -> float:
    return plan.peak_bytes(recomputed_layers_of(cfg, plan, free_bytes=0.0), _offloads(cfg, device_type))


def _words(
    cfg: RunConfig, plan: ActivationPlan, count: int, wanted: int, micro: int, device_type: str, free_bytes: float
) -> str:
    peak = plan.peak_bytes(count, _offloads(cfg, device_type))
    text = f"recompute: {count or 'none'} of {plan.layers} layers"
    if _offloads(cfg, device_type):
        text += ", their inputs in main memory"
    elif cfg.train.recompute == "offload":
        text += " (on a CPU offload is the same as all)"
    text += f"; activations take up to {_gib(peak)} of {_gib(free_bytes)} free"
    if cfg.train.recompute == "auto" and count:
        text += f", and {_gib(plan.peak_bytes(0))} if all were kept"
    if micro < wanted:
        text += f"; {micro} sequence(s) a forward pass instead of {wanted}, to fit"
    if peak <= free_bytes:
        return text
    advice = ["data.max_length"] if cfg.train.micro_batch_size in (None, 1) else ["train.micro_batch_size"]
    if cfg.train.recompute == "none" or isinstance(cfg.train.recompute, int):
        advice.append("recompute more layers (train.recompute=auto)")
    return f"{text}\nWARNING: this may not fit; lower {' or '.join(advice)}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


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
    found, choice = foresee(cfg, shape, ranks, device_type, free_bytes)
    static, teacher = found.static, describe_teacher(cfg, shape)
    activations = found.activations
    kept, recomputed = (activations.peak_bytes(n) for n in (0, max(0, len(activations.kept) - 1)))
    lines += [
        f"model: {static.parameters:,} parameters, {static.trained:,} trained ({static.trained / static.parameters:.3%})",
        f"memory before activations: {_gib(static.total_bytes)} a rank "
        f"({', '.join(f'{name} {size / 2**30:.2f}' for name, size in static.parts.items())})",
        *([teacher] if teacher else []),
        f"memory of activations: {_gib(kept)} a rank when no layer is recomputed, {_gib(recomputed)} when all are "
        f"(train.recompute={cfg.train.recompute})",
        f"predicted peak: {_gib(found.peak_bytes)} a rank, {found.moment}, with {found.recomputed or 'no'} layer(s) "
        f"recomputed and {found.micro_batch} sequence(s) a forward pass",
    ]
    if free_bytes is not None and found.needed_bytes > free_bytes:
        from finetune.planning.advice import changes_that_fit

        lines.append(f"WARNING: {_gib(found.needed_bytes)} are needed with a margin, {_gib(free_bytes)} are free")
        changes = changes_that_fit(cfg, shape, ranks, device_type, free_bytes)
        lines += [f"  {change.words} saves {_gib(change.saved_bytes)}{'' if change.fits else ', not enough alone'}" for change in changes]
    return "\n".join(lines)


def dry_run(cfg: RunConfig) -> str:
    """The resolved YAML and, as comments, the plan; nothing is loaded, nothing is written."""
    ranks, device_type = int(os.environ.get("WORLD_SIZE", "1")), device_type_here()
    plan = describe_plan(cfg, shape_of(cfg.model.name), ranks, device_type, free_memory(device_type))
    return "\n".join([to_yaml(cfg).rstrip(), "", *(f"# {line}" for line in plan.splitlines())])
