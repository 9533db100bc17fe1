"""What a run does to fit into its device's memory: how many sequences a forward pass, which layers twice."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.schema import RunConfig
from finetune.planning.activations import ActivationPlan, plan_activations
from finetune.planning.peak_memory import Footprint, predict
from finetune.system.format import format_bytes
from finetune.system.machine import available_memory, device_memory, ranks_here, resident_memory

# Tokens of a forward pass from which more of them are no faster: on a CPU the products are as fast by then, and every
# token more only raises the peak.
_ENOUGH_TOKENS = {"cpu": 2048}
_ENOUGH_ON_A_GPU = 8192


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """What a run does to fit: sequences a forward pass, `train.gradient_checkpointing` without auto, both in words.

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

    free_bytes: what activations may take; None where it is not known. `train.micro_batch_size` and a
    `train.gradient_checkpointing` that is not auto stay as given; what nothing makes fit is
    tried all the same, with a message.
    """
    micro = derive_micro_batch(cfg, ranks, device_type)
    if free_bytes is None:
        recompute = "all" if cfg.train.gradient_checkpointing == "auto" else cfg.train.gradient_checkpointing
        plan = plan_activations(shape, cfg, micro, device_type)
        words = f"recompute: {recompute} (the free memory is not known here)"
        return MemoryChoice(micro, recompute, words, _count(recompute, len(plan.kept)))
    wanted = micro
    plan = plan_activations(shape, cfg, micro, device_type)
    while _least_peak(cfg, plan, device_type) > free_bytes and micro > 1 and cfg.train.micro_batch_size is None:
        micro //= 2
        plan = plan_activations(shape, cfg, micro, device_type)
    count = recomputed_layers_of(cfg, plan, free_bytes)
    recompute = count if cfg.train.gradient_checkpointing == "auto" and count else "none"
    if cfg.train.gradient_checkpointing != "auto":
        recompute = cfg.train.gradient_checkpointing
    return MemoryChoice(micro, recompute, _words(cfg, plan, count, wanted, micro, device_type, free_bytes), count)


def recomputed_layers_of(cfg: RunConfig, plan: ActivationPlan, free_bytes: float = math.inf) -> int:
    """Layers that a setting recomputes; for auto, as many as it takes."""
    setting = cfg.train.gradient_checkpointing
    return plan.fewest(free_bytes) if setting == "auto" else _count(setting, len(plan.kept))


def _count(setting: str | int, reached: int) -> int:
    """Layers that a `train.gradient_checkpointing` other than auto recomputes, of those that backward reaches."""
    if isinstance(setting, int):
        return min(setting, reached)
    return 0 if setting == "none" else max(0, reached - 1)


def foresee(
    cfg: RunConfig, shape: Mapping[str, Any], ranks: int, device_type: str, free_bytes: float | None
) -> Footprint:
    """The footprint of a run that finds so many bytes of its device free before it loads, and what it does to fit.

    free_bytes: as `free_memory` says; the prediction counts the process too.
    """
    micro = derive_micro_batch(cfg, ranks, device_type)
    beside = predict(cfg, shape, device_type, micro, 0, ranks=ranks)
    usable = None if free_bytes is None else beside.usable_bytes(free_bytes)
    choice = choose_memory(cfg, shape, ranks, device_type, usable)
    return predict(cfg, shape, device_type, choice.micro_batch, choice.recomputed, ranks=ranks)


def free_memory(device_type: str) -> float | None:
    """Bytes that a rank can have of its device, those that this process holds of main memory included; None where
    nobody can tell without starting the device.
    """
    if device_type == "cuda":
        found = device_memory()
        return None if found is None else float(found.free_bytes)
    free = available_memory()
    return None if free is None else free / ranks_here(os.environ) + resident_memory()


def _offloads(cfg: RunConfig, device_type: str) -> bool:
    return cfg.train.gradient_checkpointing == "offload" and device_type != "cpu"


def _least_peak(cfg: RunConfig, plan: ActivationPlan, device_type: str) -> float:
    return plan.peak_bytes(recomputed_layers_of(cfg, plan, free_bytes=0.0), _offloads(cfg, device_type))


def _words(
    cfg: RunConfig, plan: ActivationPlan, count: int, wanted: int, micro: int, device_type: str, free_bytes: float
) -> str:
    peak = plan.peak_bytes(count, _offloads(cfg, device_type))
    text = f"recompute: {count or 'none'} of {plan.layers} layers"
    if _offloads(cfg, device_type):
        text += ", their inputs in main memory"
    elif cfg.train.gradient_checkpointing == "offload":
        text += " (on a CPU offload is the same as all)"
    text += f"; activations take up to {format_bytes(peak)} of {format_bytes(free_bytes)} free"
    if cfg.train.gradient_checkpointing == "auto" and count:
        text += f", and {format_bytes(plan.peak_bytes(0))} if all were kept"
    if micro < wanted:
        text += f"; {micro} sequence(s) a forward pass instead of {wanted}, to fit"
    if peak <= free_bytes:
        return text
    advice = ["data.max_length"] if cfg.train.micro_batch_size in (None, 1) else ["train.micro_batch_size"]
    if cfg.train.gradient_checkpointing == "none" or isinstance(cfg.train.gradient_checkpointing, int):
        advice.append("recompute more layers (train.gradient_checkpointing=auto)")
    return f"{text}\nWARNING: this may not fit; lower {' or '.join(advice)}"
