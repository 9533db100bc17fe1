"""Fits a run to its machine: the threads of a rank, the layers that are recomputed, the sequences of a forward pass."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from finetune.config.schema import RunConfig
from finetune.losses.hidden import base_of
from finetune.models.recompute import apply_recompute
from finetune.planning.machine import available_memory, pick_threads, ranks_here, usable_cores
from finetune.planning.plan import choose_memory

# What estimates and allocators need around what was counted.
_USED_SHARE = 0.85
_BYTES_PER_TRAINED_LATER = 12  # gradient and AdamW's moments; the weights are there already


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


def fit_to_memory(cfg: RunConfig, model: nn.Module, accelerator: Accelerator, say: Callable[[str], None]) -> int:
    """Sets which layers of the adapted model are recomputed, as `train.recompute` says and memory allows.

    Every rank decides as the one with the least memory does, measured when all of them have loaded.
    Returns: sequences a forward pass.
    Raises: ConfigError if more layers are asked for than there are.
    """
    accelerator.wait_for_everyone()
    free = torch.tensor([_free_bytes(model, accelerator.device)], dtype=torch.float64, device=accelerator.device)
    least = accelerator.gather(free).min().item() if accelerator.num_processes > 1 else free.item()
    choice = choose_memory(
        cfg, base_of(model).config.to_dict(), accelerator.num_processes, accelerator.device.type,
        None if least < 0 else least,
    )  # fmt: skip
    apply_recompute(model, choice.recompute)
    say(choice.text)
    return choice.micro_batch


def _free_bytes(model: nn.Module, device: torch.device) -> float:
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
    return max(0.0, free * _USED_SHARE - trained * _BYTES_PER_TRAINED_LATER)
