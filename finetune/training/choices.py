"""What a run chooses by itself and its last bits depend on. Checkpoints hold it, and a continuation repeats it.

The sum of a matrix product depends in its last bits on the rows and the threads that it is split over. Free memory, the
steps that are left and the cores of a machine must therefore not choose anew in the middle of a run.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from finetune.config.schema import TrainConfig
from finetune.ops.dispatch import STATE
from finetune.planning.auto_batch import BatchPlan
from finetune.system.console import Log
from finetune.system.machine import pick_threads, usable_cores


@dataclass(frozen=True)
class Choices:
    """Ranks and threads, sequences per forward pass, checkpointed layers, compiled kernels, copies of 4-bit weights."""

    ranks: int
    threads: int
    micro_batch: int
    gradient_checkpointing: str | int
    compiled: bool
    keep_dequantized: bool = False


def current_choices(plan: BatchPlan, ranks: int) -> dict[str, Any]:
    """Return the choices of this process as a checkpoint stores them."""
    threads, kept = torch.get_num_threads(), plan.keep_dequantized
    return asdict(Choices(ranks, threads, plan.micro_batch, plan.recompute, STATE.compiled, kept))


def repeat_choices(train: TrainConfig, stored: dict[str, Any], ranks: int, log: Log) -> dict[str, Any]:
    """Set the threads of an earlier part of the run; return its choices for the settings that are automatic.

    What the user sets stays. Another number of ranks changes the last bits in any case, so it chooses anew.

    Args:
        train: of the continuation.
        stored: from the checkpoint; empty in those of older versions.
    """
    if stored.get("ranks") != ranks:
        return {}
    earlier = Choices(**stored)
    if earlier.threads != torch.get_num_threads():
        cores = usable_cores()
        if pick_threads(os.environ, cores) is None or cores < earlier.threads * ranks:
            log(
                f"WARNING: threads: {earlier.threads} before, {torch.get_num_threads()} now: the last bits can differ "
                f"from an unbroken run\nhelp: continue with {earlier.threads} cores per rank"
            )
        else:
            torch.set_num_threads(earlier.threads)
    repeated: dict[str, Any] = {}
    if train.micro_batch_size is None:
        repeated["micro_batch_size"] = earlier.micro_batch
    if train.gradient_checkpointing == "auto":
        repeated["gradient_checkpointing"] = earlier.gradient_checkpointing
    return repeated
