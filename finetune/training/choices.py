"""What a run chooses by itself and its last bits depend on. Checkpoints hold it, and a continuation repeats it.

The sum of a matrix product depends in its last bits on the rows and the threads that it is split over. Free memory, the
steps that are left and the cores of a machine must therefore not choose anew in the middle of a run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import TrainConfig
from finetune.ops.dispatch import STATE
from finetune.planning.auto_batch import BatchPlan
from finetune.system.atomic import write_text
from finetune.system.console import Log
from finetune.system.errors import IntegrityError
from finetune.system.machine import pick_threads, usable_cores
from finetune.system.sealed import seal, unseal
from finetune.training.checkpoint import TrainState, read_state

# Left by a rank that ran out of memory while the others waited for it inside a pass.
_SMALLER = "out_of_memory.json"


@dataclass(frozen=True)
class Choices:
    """Ranks and threads, sequences per forward pass, checkpointed layers, compiled kernels, copies of 4-bit weights.

    micro_batch_size: the setting, in place of which a run that ran out of memory has a smaller micro_batch.
    """

    ranks: int
    threads: int
    micro_batch: int
    gradient_checkpointing: str | int
    compiled: bool
    keep_dequantized: bool = False
    micro_batch_size: int | None = None


def current_choices(train: TrainConfig, plan: BatchPlan, ranks: int) -> dict[str, Any]:
    """Return the choices of this process as a checkpoint stores them. train: as the user set it."""
    threads, kept = torch.get_num_threads(), plan.inputs.quant.keep_dequantized
    given = train.micro_batch_size
    return asdict(Choices(ranks, threads, plan.micro_batch, plan.recompute, STATE.compiled, kept, given))


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
    if train.micro_batch_size in (None, earlier.micro_batch_size):
        repeated["micro_batch_size"] = earlier.micro_batch
    if train.gradient_checkpointing == "auto":
        repeated["gradient_checkpointing"] = earlier.gradient_checkpointing
    return repeated


def leave_smaller(folder: Path, state: TrainState, step: int, micro_batch: int) -> None:
    """Leave the choices of a run, with a smaller micro-batch from `step` on, to its next start in this folder."""
    halvings = [*state.halvings, {"step": step, "micro_batch": micro_batch}]
    left = {"choices": state.choices | {"micro_batch": micro_batch}, "halvings": halvings}
    write_text(folder / _SMALLER, json.dumps(seal(left), indent=2) + "\n")


def choices_before(folder: Path, checkpoint: Path | None) -> tuple[dict[str, Any], Sequence[dict[str, int]]]:
    """Return the choices of an earlier part of a run, empty for a new one, and how often memory ran out in it."""
    state = None if checkpoint is None else read_state(checkpoint)
    choices, halvings = ({}, []) if state is None else (state.choices, state.halvings)
    if (file := folder / _SMALLER).is_file():
        try:
            left = unseal(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            advice = "help: remove it; the micro-batch is then that of the checkpoint"
            raise IntegrityError(f"{file}: corrupt ({error})\n{advice}") from error
        if left["choices"]["micro_batch"] < choices.get("micro_batch", math.inf):
            return left["choices"], left["halvings"]
    return choices, halvings
