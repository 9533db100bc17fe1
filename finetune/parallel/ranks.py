"""The processes of a run: ranks that accelerate, torchrun or Slurm started, joined by data parallelism."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from finetune.config.schema import RunConfig
from finetune.system.console import Log
from finetune.system.errors import ConfigError

# What `accelerate launch` sets for engines that split a model.
_OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def build_accelerator(cfg: RunConfig) -> Accelerator:
    """Join the ranks of this run.

    The config decides precision and compilation, so what a launcher's file sets has no effect.

    Raises:
        ConfigError: the ranks are not those of train.world_size, or the launcher asks for another engine.
    """
    problems = [
        f"{variable}: the launcher asks for {engine}, expected data parallelism"
        for variable, engine in _OTHER_ENGINES.items()
        if os.environ.get(variable, "false").lower() in ("1", "true")
    ]
    if problems:
        help_line = "help: use a file of launch/accelerate/: accelerate launch --config_file launch/accelerate/ddp.yaml"
        raise ConfigError("\n".join([*problems, help_line]))
    # cpu=True makes accelerate start ranks over gloo; otherwise torchrun on CPU gives each process a single rank.
    on_cpu = not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", dynamo_backend="no")
    except ValueError:
        # Another trainer of this process chose a precision, which is global. Nothing here uses it.
        accelerator = Accelerator(cpu=on_cpu)
    if cfg.train.world_size not in (None, accelerator.num_processes):
        raise ConfigError(
            f"train.world_size: expected {cfg.train.world_size} ranks, found {accelerator.num_processes}\n"
            "help: use a launch command of launch/accelerate/"
        )
    return accelerator


def describe_ignored_settings(cfg: RunConfig, log: Log) -> None:
    """Log what the launcher sets and this run does not obey."""
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in ("no", ""):
        log(f"launcher: mixed_precision={wanted} has no effect, model.dtype={cfg.model.dtype} decides")


def wrap_ranks(loss: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return the loss as a module whose gradients are the mean over all ranks.

    At its start, data parallelism copies rank 0's tensors to all ranks. Frozen weights are equal, and stay out of it.
    """
    if accelerator.num_processes == 1:
        return loss
    frozen = [name for name, parameter in loss.named_parameters() if not parameter.requires_grad]
    constants = [*frozen, *(name for name, _ in loss.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, constants)
    device = accelerator.device
    # A gradient is stored once, in its bucket. Buffers are constants: rotary frequencies.
    return DistributedDataParallel(
        loss,
        device_ids=None if device.type == "cpu" else [device],
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def without_exchange(loss: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a backward pass adds to the gradients of this rank alone."""
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) else nullcontext()
