"""Where memory runs out, a step is repeated with half the micro-batch, to the bits of a run that began so."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from finetune.config.schema import TrainConfig
from finetune.data.documents import Document
from finetune.data.packing import MapSampler, SequenceOrder
from finetune.system.errors import ResourceError
from finetune.training.loop import StepInputs, train_step
from finetune.training.micro_batch import MicroBatch, largest_batch, try_largest_pass
from finetune.training.optimizer import build_optimizer

ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError(),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}
LENGTHS = (3, 5, 2, 9, 4, 4, 6, 7)


class Noisy(nn.Module):
    """A loss with dropout that raises an error in its `fails_at`-th call, or in each with more than `room` tokens."""

    def __init__(self, error: Exception | None = None, fails_at: int = 0, room: int = 10**9):
        super().__init__()
        self.weight_TD = nn.Parameter(torch.linspace(-1, 1, 20 * 8).reshape(20, 8))
        self.error, self.fails_at, self.room, self.calls = error, fails_at, room, 0
        self.batches: list[tuple[int, ...]] = []
        self.held = weakref.WeakSet()

    def forward(self, batch):
        self.calls += 1
        self.batches.append(batch.segment_lengths)
        states_TD = torch.dropout(self.weight_TD[batch.input_ids[0]], 0.5, True)
        self.held.add(states_TD)
        if self.error is not None and (self.calls == self.fails_at or batch.tokens > self.room):
            raise type(self.error)(*self.error.args)  # a new one: a traceback holds tensors
        return states_TD.sin().sum()


def step_inputs(loss: nn.Module, size: int) -> StepInputs:
    cfg = TrainConfig(batch_size=4, learning_rate=0.1)
    documents = [Document(np.arange(n), np.arange(n, dtype=np.int32), f"row {n}") for n in LENGTHS]
    order = SequenceOrder(LENGTHS, [1.0] * len(LENGTHS), None, cfg.batch_size, 0)
    return StepInputs(
        cfg=cfg,
        accelerator=Accelerator(),
        loss=loss,
        optimizer=build_optimizer(cfg, loss.named_parameters()),
        sampler=MapSampler(documents, order),
        total_steps=4,
        share_prefixes=False,
        is_sharded=False,
        resume_command="",
        micro_batch=MicroBatch(size),
        last_checkpoint=lambda: None,
    )


def trained(loss: Noisy, sizes: list[int]) -> tuple[torch.Tensor, list[float]]:
    """Train a step with each micro-batch; return the weights, and the losses."""
    inputs = step_inputs(loss, sizes[0])
    losses = []
    for step, size in enumerate(sizes, start=1):
        inputs.micro_batch.size = size
        losses.append(train_step(inputs, step).loss)
    return loss.weight_TD.detach(), losses


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("fails_at", [2, 3])
def test_a_repeated_step_has_the_bits_of_one_with_the_smaller_micro_batch(name, fails_at):
    """One pass per step with a micro-batch of 4: calls 2 and 3 are steps 2 and 3."""
    loss = Noisy(ERRORS[name], fails_at)
    inputs = step_inputs(loss, 4)
    found = [train_step(inputs, step).loss for step in (1, 2, 3, 4)]
    weights, expected = trained(Noisy(), [4] * (fails_at - 1) + [2] * (5 - fails_at))
    assert torch.equal(loss.weight_TD, weights) and found == expected
    assert inputs.micro_batch.size == 2


def test_a_step_that_fails_in_its_last_pass_forgets_the_passes_before():
    loss = Noisy(ERRORS["CPU"], fails_at=2)
    inputs = step_inputs(loss, 2)
    train_step(inputs, 1)
    weights, _ = trained(Noisy(), [1])
    assert torch.equal(loss.weight_TD, weights)
    assert [len(batch) for batch in loss.batches] == [2, 2, 1, 1, 1, 1]


def test_tensors_of_a_failed_pass_are_freed_before_the_next():
    class Watching(Noisy):
        def forward(self, batch):
            alive.append(len(self.held))
            return super().forward(batch)

    alive: list[int] = []
    loss = Watching(ERRORS["GPU"], fails_at=1)
    train_step(step_inputs(loss, 4), 1)
    assert alive[1] == 0


def test_every_halving_is_reported_down_to_one_and_then_the_advice():
    halvings: list[tuple[int, int]] = []
    loss = Noisy(ERRORS["GPU"], room=0)
    micro_batch = MicroBatch(4, lambda step, size, problem: halvings.append((step, size)), lambda: "help: buy memory")
    before = loss.weight_TD.detach().clone()
    with pytest.raises(ResourceError, match=r"step 3: out of memory with one sequence.*\nhelp: buy memory") as raised:
        train_step(replace(step_inputs(loss, 4), micro_batch=micro_batch), 3)
    assert raised.value.exit_code == 4
    assert halvings == [(3, 2), (3, 1)]
    assert torch.equal(loss.weight_TD, before) and loss.weight_TD.grad is None


def test_another_error_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train_step(step_inputs(Noisy(RuntimeError("shapes do not match"), 1), 4), 1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_largest_pass_is_that_with_the_most_rows_of_all_steps(size):
    inputs = step_inputs(Noisy(), size)
    for step in (1, 2, 3, 4):
        train_step(inputs, step)
    batch = largest_batch(inputs, 1)
    assert batch is not None and batch.tokens == max(map(sum, inputs.loss.batches))


def test_the_largest_pass_halves_the_micro_batch_before_the_first_step_and_leaves_nothing():
    loss = Noisy(ERRORS["GPU"], room=max(LENGTHS) + 3)
    inputs = step_inputs(loss, 4)
    state = torch.get_rng_state()
    batch = try_largest_pass(inputs, 1, reserved_bytes=1000)
    assert batch is not None and batch.tokens <= loss.room
    assert torch.equal(torch.get_rng_state(), state)
    assert loss.weight_TD.grad is None and not inputs.optimizer.state
    tried = len(loss.batches)
    found = [train_step(inputs, step).loss for step in (1, 2, 3, 4)]
    assert all(sum(each) <= loss.room for each in loss.batches[tried:]), "no step runs out later"
    weights, expected = trained(Noisy(), [inputs.micro_batch.size] * 4)
    assert torch.equal(loss.weight_TD, weights) and found == expected


def test_a_rank_of_a_sharded_base_leaves_half_the_micro_batch_to_the_restart():
    left: list[tuple[int, int]] = []
    micro_batch = MicroBatch(4, leave=lambda step, size: left.append((step, size)))
    with pytest.raises(ResourceError, match="max-restarts"):
        train_step(replace(step_inputs(Noisy(ERRORS["GPU"], 1), 4), micro_batch=micro_batch), 2)
    assert left == [(2, 2)] and micro_batch.size == 4
