"""A frozen base split over ranks by torch's FSDP2: decoder layers, embedding and head are gathered while they compute.

Frozen tensors alone are split. What a run trains stays whole on every rank, so optimizers, clipping, checkpoints and
saved adapters are those of data parallelism, and a checkpoint continues on any number of ranks.
Source: Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


def is_sharded(module: nn.Module) -> bool:
    """Return whether a part of a module is split over ranks."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Hold the weights of a sharded module, as the head, on this rank. All ranks enter it the same number of times."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
