"""Let ranks with different amounts of work use sharded models without hanging.

Every use of a sharded module gathers its weights from all ranks: a collective. Within `in_step` each rank first
announces the module that it gathers next. Of all announced modules the first in the order of the models is gathered, by
every rank; a rank that wants another one, or none any more, frees it at once. So at each turn some rank goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from finetune.system.errors import FinetuneError

# Of announcements the smallest counts: failures before modules, and a rank without work last.
_FINISHED = 2**62


@contextmanager
def in_step(*models: nn.Module) -> Iterator[None]:
    """Let each rank make as many forward passes of sharded models inside, in any order, as it needs.

    Every rank must enter the block. A rank that leaves it helps the others until all have left it. Passes inside make
    no gradients, and other collectives, such as sums over ranks, belong after the block. Inside another block it adds
    nothing.

    Args:
        models: all models that run inside, the same in the same order on every rank. One that is not sharded costs
            nothing.

    Raises:
        FinetuneError: another rank left the block by an exception; names both.
        RuntimeError: a block is inside another one that lacks its models.
    """
    parts = _parts(models)
    if not parts:
        yield
        return
    if _turns:
        if unknown := [part for part in parts if part not in _turns[-1].numbers]:
            raise RuntimeError(f"in_step: the outer block lacks {len(unknown)} sharded modules of this one")
        yield
        return
    turns = _Turns(parts)
    hooks = [part.register_forward_pre_hook(lambda part, _: turns.take(part), prepend=True) for part in parts]
    _turns.append(turns)
    ahead = [part for part in parts if hasattr(part, "prefetched")]
    for part in ahead:
        part.set_modules_to_forward_prefetch([])  # a gather that nobody announced
    try:
        yield
        turns.finish()
    except BaseException as error:
        turns.fail(error)
        raise
    finally:
        _turns.pop()
        for hook in hooks:
            hook.remove()
        for part in ahead:
            part.set_modules_to_forward_prefetch(part.prefetched)


def _parts(models: Sequence[nn.Module]) -> list[Any]:
    """Return the modules that are gathered, each once. The root of a model splits nothing itself."""
    found = (part for model in models for part in model.modules() if isinstance(part, FSDPModule))
    return [
        part for part in dict.fromkeys(found) if sum(isinstance(inner, FSDPModule) for inner in part.modules()) == 1
    ]


def gathers(part: nn.Module) -> None:
    """Announce that this rank gathers a sharded module now, other than by calling it. Does nothing outside `in_step`.

    Raises: FinetuneError as `in_step`.
    """
    if _turns:
        _turns[-1].take(part)


def is_gathered(part: nn.Module) -> bool:
    """Return whether this rank holds the whole weights of a sharded module now."""
    return not any(isinstance(parameter, DTensor) for parameter in part.parameters())


class _Turns:
    """The announcements of one block."""

    def __init__(self, parts: list[Any]):
        self.parts = parts
        self.numbers = {part: number for number, part in enumerate(parts)}
        self._group = _host_group(dist.group.WORLD)
        self._failed = False

    def take(self, part: nn.Module) -> None:
        """Return when all ranks gather this module next, or have it."""
        if is_gathered(part):
            return
        while (number := self._announce(self.numbers[part])) != self.numbers[part]:
            self._join(number)

    def finish(self) -> None:
        """Return when no rank needs a module."""
        while (number := self._announce(_FINISHED)) != _FINISHED:
            self._join(number)

    def fail(self, error: BaseException) -> None:
        """Let the other ranks raise, too."""
        if not self._failed:
            self._announce(-1 - dist.get_rank(), error)

    def _announce(self, number: int, error: BaseException | None = None) -> int:
        smallest = torch.tensor(number)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self._group)
        if smallest < 0:
            self._failed = True
            rank, text = -1 - int(smallest), [f"{type(error).__name__}: {error}"]
            dist.broadcast_object_list(text, rank, group=self._group)
            if error is None:
                raise FinetuneError(f"rank {rank} failed, so all ranks stop: {text[0]}")
        return int(smallest)

    def _join(self, number: int) -> None:
        """Make the gather of a module that another rank uses."""
        part = self.parts[number]
        held = is_gathered(part)
        if held:
            part.reshard()
        part.unshard()
        if not held:
            part.reshard()


_turns: list[_Turns] = []


@cache
def _host_group(world: dist.ProcessGroup | None) -> Any:
    """Return a group of all ranks that exchanges tensors in main memory."""
    return world if "gloo" in dist.get_backend_config(world) else dist.new_group(backend="gloo")
