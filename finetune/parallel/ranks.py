"""The processes of a run: ranks that accelerate, torchrun or Slurm started, joined by data parallelism."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.config.schema import RunConfig
from finetune.ops.limits import GRADIENT_BUCKET_BYTES
from finetune.parallel.heartbeat import Heartbeat
from finetune.parallel.join import meet, route_over
from finetune.parallel.other_engines import refuse_other_engines
from finetune.system.accelerator import default_device, on_gpu
from finetune.system.console import Log
from finetune.system.errors import ConfigError

# Ranks wait for one that tokenizes for hours. One that is gone is noticed by its beats, not by this limit.
_COLLECTIVE_TIMEOUT = timedelta(hours=24)


@contextmanager
def join_ranks() -> Iterator[Heartbeat]:
    """Join the ranks of this launch and watch them until the block ends. A single process joins nothing.

    Raises:
        RankLost: ranks did not come, or one is gone.
    """
    meeting = meet()
    with Heartbeat(meeting) as heartbeat, heartbeat.explained():
        if meeting is not None and not dist.is_initialized():
            route_over(meeting)
            backend = dist.get_default_backend_for_device(default_device())
            # Without a store of its own, an attempt after a restart can read addresses of the one before.
            store, ranks = dist.PrefixStore("group", meeting.connect()), len(meeting.hosts)
            options = {"store": store, "rank": meeting.rank, "world_size": ranks, "timeout": _COLLECTIVE_TIMEOUT}
            dist.init_process_group(backend, **options)
        yield heartbeat


def build_accelerator(cfg: RunConfig) -> Accelerator:
    """Join the ranks of this run.

    The config decides precision and compilation, so what a launcher's file sets has no effect.

    Raises:
        ConfigError: the ranks are not those of train.world_size, or the launcher asks for another engine.
    """
    refuse_other_engines(os.environ)
    # cpu=True makes accelerate start ranks over gloo; otherwise torchrun on CPU gives each process a single rank.
    on_cpu = not on_gpu(default_device())
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


def copy_from_main(parameters: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Give every rank the main rank's values of parameters that are not sharded: of the adapter, and trained ones."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            dist.broadcast(parameter.detach(), 0)


def sum_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace every gradient by its sum over all ranks, in the gradient's own type.

    Small gradients are exchanged together, so the extra memory is that of one bucket.
    """
    if accelerator.num_processes == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:  # a rank whose rows did not use it
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, total in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one type and device, in order, to at most GRADIENT_BUCKET_BYTES; a larger one is by itself."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and held + tensor.nbytes <= GRADIENT_BUCKET_BYTES):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.nbytes
    if bucket:
        yield bucket
