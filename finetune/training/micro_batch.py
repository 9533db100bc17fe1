"""Fewer sequences per forward pass once memory runs out, and the largest pass of a run tried before its first step.

The gradient of a step is a sum divided by a global count, so a step can be repeated with other micro-batches.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from finetune.data.batch import Batch, build_batch
from finetune.data.packing import micro_batches
from finetune.system.accelerator import on_gpu
from finetune.system.errors import ResourceError
from finetune.system.out_of_memory import release_memory, result_or_none

if TYPE_CHECKING:
    from finetune.training.loop import StepInputs

R = TypeVar("R")
# Steps whose passes are built to compare them by the rows that they compute; sequences are compared by their tokens.
_STEPS_COMPARED = 4


@dataclass
class MicroBatch:
    """Sequences per forward pass, the same on all ranks.

    Attributes:
        size: at least 1.
        halved: called on all ranks with the step that is repeated, the new size and the error.
        advice: returns what to change when one sequence does not fit.
        leave: for ranks that cannot repeat a pass, since each pass of a sharded base is a common one: called with the
            step and the size for a restart. None where ranks make their passes alone.
    """

    size: int
    halved: Callable[[int, int, str], None] = lambda step, size, problem: None
    advice: Callable[[], str] = lambda: ""
    leave: Callable[[int, int], None] | None = None
    _problem: str = "on another rank"

    def attempt(self, work: Callable[[], R], step: int) -> R | None:
        """Return the result of `work`; None if memory ran out.

        Raises: ResourceError if memory ran out and the other ranks wait inside a pass.
        """
        self._problem = "on another rank"
        result = result_or_none(work, self._note)
        if result is not None or self.leave is None:
            return result
        if self.size == 1:
            raise self._too_small(step)
        self.leave(step, self.size // 2)
        problem = f"step {step}: out of memory with micro_batch={self.size} ({self._problem})"
        raise ResourceError(
            f"{problem}; one rank cannot repeat a pass of a sharded base\n"
            "help: start the same command again, or let torchrun --max-restarts do so: the run continues from its last "
            f"checkpoint with micro_batch={self.size // 2}"
        )

    def halve(self, step: int) -> None:
        """Halve the size, once memory ran out in `step`. Raises: ResourceError if it is 1."""
        if self.size == 1:
            raise self._too_small(step)
        self.size //= 2
        self.halved(step, self.size, self._problem)

    def _note(self, problem: str) -> None:
        self._problem = problem

    def _too_small(self, step: int) -> ResourceError:
        advice = self.advice()
        found = f"step {step}: out of memory with one sequence per forward pass ({self._problem})"
        return ResourceError(f"{found}\n{advice}".rstrip())


def try_largest_pass(inputs: StepInputs, first_step: int, reserved_bytes: int = 0) -> Batch | None:
    """Make the largest forward and backward pass of a run once, before its first step, and halve until it fits.

    Nothing of it remains: neither gradients, nor random state, nor sums of figures.

    Args:
        first_step: from 1; the passes from there on count.
        reserved_bytes: held while the pass runs, for what the first update allocates.

    Returns:
        The batch that fits; None if the rows are streamed, so their lengths are not known yet.

    Raises:
        ResourceError: not even one sequence fits.
    """
    accelerator, device = inputs.accelerator, inputs.accelerator.device
    devices = [device] if on_gpu(device) else []
    while True:
        batch = largest_batch(inputs, first_step)
        if batch is None:
            return None

        def work(batch: Batch = batch) -> bool:
            reserved = torch.empty(reserved_bytes, dtype=torch.uint8, device=device)
            if inputs.before_step is not None:
                inputs.before_step(first_step, lambda _: [batch])
            (inputs.loss(batch) * 0.0).backward()
            return len(reserved) == reserved_bytes

        with torch.random.fork_rng(devices, device_type=device.type):
            passed = inputs.micro_batch.attempt(work, first_step)
        if inputs.row_loss is not None:
            inputs.row_loss.take_sums()
        inputs.optimizer.zero_grad(set_to_none=True)
        failed = torch.tensor([passed is None], dtype=torch.float64, device=device)
        if not accelerator.gather(failed).any():
            release_memory()
            return batch
        inputs.micro_batch.halve(first_step)


def largest_batch(inputs: StepInputs, first_step: int) -> Batch | None:
    """Return the batch of the pass that computes the most rows, of all ranks and steps; None if it is not known."""
    ranks, size, sampler = inputs.accelerator.num_processes, inputs.micro_batch.size, inputs.sampler
    if sampler.lengths(first_step - 1) is None:
        return None

    def most_tokens(step: int) -> int:
        tokens = sampler.lengths(step - 1) or [0]
        return max(sum(tokens[i] for i in each) for share in micro_batches(tokens, ranks, size) for each in share)

    candidates = []
    for step in heapq.nlargest(_STEPS_COMPARED, range(first_step, inputs.total_steps + 1), key=most_tokens):
        sequences = sampler.largest(step - 1)
        tokens = [sum(map(len, sequence)) for sequence in sequences]
        passes = (each for share in micro_batches(tokens, ranks, size) for each in share)
        largest = max(passes, key=lambda each: sum(tokens[i] for i in each))
        documents = [document for i in largest for document in sequences[i]]
        candidates.append(build_batch(documents, share_prefixes=inputs.share_prefixes))
    return max(candidates, key=lambda batch: (batch.rows, batch.tokens))
