"""Fits a run to its machine: the threads of a rank, the layers that are recomputed, the sequences of a forward pass."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from finetune.config.schema import RunConfig
from finetune.losses.hidden_states import base_of
from finetune.models.gradient_checkpointing import apply_gradient_checkpointing
from finetune.planning.auto_batch import choose_memory
from finetune.planning.peak_memory import MARGIN, predict
from finetune.planning.teacher import recovers
from finetune.system import heap
from finetune.system.console import Log
from finetune.system.machine import available_memory, pick_threads, ranks_here, usable_cores

# Gradient and AdamW's moments; the weights are there already. Moments once more in a guard's recovery.
_BYTES_PER_TRAINED_LATER, _BYTES_IN_A_RECOVERY = 12, 8


def use_all_cores(device_type: str) -> str | None:
    """Sets the threads that this rank computes with on a CPU; says how many. Launchers give a rank one thread, torch
    gives a container all of its host's.

    Returns: None on another device.
    """
    if device_type != "cpu":
        return None
    cores, ranks = usable_cores(), ranks_here(os.environ)
    threads = pick_threads(os.environ, cores)
    if threads is None:
        return f"threads: {torch.get_num_threads()} a rank (OMP_NUM_THREADS)"
    torch.set_num_threads(threads)
    return f"threads: {threads} a rank ({cores} core(s) to use, {ranks} rank(s) here)"


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """micro_batch: sequences a forward pass. predicted_peak_bytes: of this rank, as RunResult's `peak_bytes` counts."""

    micro_batch: int
    predicted_peak_bytes: int


def choose_micro_batch(cfg: RunConfig, model: nn.Module, accelerator: Accelerator, log: Log) -> BatchPlan:
    """Sets which layers of the adapted model are recomputed, as `train.gradient_checkpointing` says and memory allows.

    Every rank decides as the one with the least memory does, measured when all of them have loaded.
    Raises: ConfigError if more layers are asked for than there are.
    """
    if accelerator.device.type == "cpu":
        install_malloc_trim(model)
    accelerator.wait_for_everyone()
    free = torch.tensor([_free_bytes(cfg, model, accelerator.device)], dtype=torch.float64, device=accelerator.device)
    least = accelerator.gather(free).min().item() if accelerator.num_processes > 1 else free.item()
    shape, kind, ranks = base_of(model).config.to_dict(), accelerator.device.type, accelerator.num_processes
    choice = choose_memory(cfg, shape, ranks, kind, None if least < 0 else least)
    apply_gradient_checkpointing(model, choice.recompute)
    log(choice.text)
    predicted = predict(cfg, shape, kind, choice.micro_batch, choice.recomputed, ranks=ranks)
    return BatchPlan(choice.micro_batch, round(predicted.peak_bytes))


def install_malloc_trim(model: nn.Module) -> None:
    """Give the system what the heap holds free: now, after loading, after each training forward pass, and before one
    that follows an evaluation.

    A layer's temporaries lie between what it keeps. glibc takes them from the heap, and once freed they are holes that
    backward's larger blocks do not fit into, so they would be held beside all that backward allocates: a quarter of a
    gigabyte for 0.5B and 1,024 tokens. Giving them back once a step costs nothing that can be seen (docs/planning.md).
    """
    heap.malloc_trim()
    evaluated = False

    def before_forward(*_: Any) -> None:
        # What an evaluation leaves: not after each of its passes, for a generated token is one of them.
        nonlocal evaluated
        if torch.is_grad_enabled() and evaluated:
            heap.malloc_trim()
        evaluated = not torch.is_grad_enabled()

    def after_forward(*_: Any) -> None:
        if torch.is_grad_enabled():
            heap.malloc_trim()

    base = base_of(model)
    decoder = getattr(base, base.base_model_prefix)
    decoder.register_forward_pre_hook(before_forward)
    decoder.register_forward_hook(after_forward)


def _free_bytes(cfg: RunConfig, model: nn.Module, device: torch.device) -> float:
    """What is left for activations once gradients and optimizer are there; below 0 if it is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        known = available_memory()
        if known is None:
            return -1.0
        free = known // ranks_here(os.environ)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    margin = MARGIN["cuda" if device.type == "cuda" else "cpu"]
    each = _BYTES_PER_TRAINED_LATER + (_BYTES_IN_A_RECOVERY if recovers(cfg) else 0)
    return max(0.0, (free - trained * each) / (1 + margin))
