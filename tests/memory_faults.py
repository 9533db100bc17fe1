"""Runs that run out of memory: an error in a pass that a test names, or a limit of the process's address space.

python tests/memory_faults.py error=RANK,STEP,PASS config=… overrides: raise an error there, once (rank -1: nowhere).
python tests/memory_faults.py limit=MB config=… overrides: allow so much more memory than the loaded run has.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]


class FailingLoss(nn.Module):
    """Another loss, whose `number`-th pass in `step` raises an error once; step 0 is before the first step."""

    def __init__(self, loss: nn.Module, step: int, number: int):
        super().__init__()
        self.loss, self.at = loss, (step, number)
        self.place = [0, 0]

    def begin(self, step: int) -> None:
        self.place = [step, 0]

    def forward(self, batch: Any) -> torch.Tensor:
        loss = self.loss(batch)
        self.place[1] += 1
        if tuple(self.place) == self.at:
            self.at = (-1, 0)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss


@contextmanager
def out_of_memory_in(step: int, number: int = 1) -> Iterator[None]:
    """Let the `number`-th pass of `step` in runs of this process raise an error once."""

    def begin(inputs: Any, now: int) -> None:
        if isinstance(inputs.loss, FailingLoss):
            inputs.loss.begin(now)

    with (
        _each_step(begin),
        _inputs(lambda inputs: replace(inputs, loss=FailingLoss(inputs.loss, step, number))),
    ):
        yield


@contextmanager
def micro_batch_from(step: int, size: int) -> Iterator[None]:
    """Let runs of this process have this micro-batch from `step` on, without any error."""

    def begin(inputs: Any, now: int) -> None:
        if now >= step:
            inputs.micro_batch.size = size

    with _each_step(begin):
        yield


@contextmanager
def _each_step(begin: Callable[[Any, int], None]) -> Iterator[None]:
    from finetune.training import loop

    original = loop.train_step

    def train_step(inputs: Any, step: int, *others: Any) -> Any:
        begin(inputs, step)
        return original(inputs, step, *others)

    with mock.patch.object(loop, "train_step", train_step):
        yield


@contextmanager
def _inputs(change: Callable[[Any], Any]) -> Iterator[None]:
    from finetune.training import recipe

    original = recipe.build_step_inputs
    with mock.patch.object(recipe, "build_step_inputs", lambda *given: change(original(*given))):
        yield


def _limit(megabytes: int) -> Callable[[Any], Any]:
    def limited(inputs: Any) -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + megabytes * 10**6
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        return inputs

    return limited


def main(fault: str, arguments: list[str]) -> int:
    from finetune.cli import main as run

    kind, _, value = fault.partition("=")
    if kind == "limit":
        with _inputs(_limit(int(value))):
            return run(["train", *arguments])
    rank, step, number = map(int, value.split(","))
    if int(os.environ.get("RANK", "0")) != rank:
        return run(["train", *arguments])
    with out_of_memory_in(step, number):
        return run(["train", *arguments])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1], sys.argv[2:]))
