"""The loop refuses NaN and infinity, and normalizes once; the learning rate is a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from finetune.config.schema import TrainConfig
from finetune.data.documents import Document
from finetune.data.packing import MapSampler, SequenceOrder
from finetune.system.errors import FinetuneError
from finetune.training.checkpoint import TrainState
from finetune.training.loop import StepInputs, fit, train_step
from finetune.training.micro_batch import MicroBatch
from finetune.training.optimizer import build_optimizer
from finetune.training.track import SilentTracker


class Linear(nn.Module):
    """loss = weight * sum of targets; its gradient is the sum of targets. After `from_call` calls it is poisoned."""

    def __init__(self, poison: str = "", from_call: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.poison, self.from_call, self.calls = poison, from_call, 0

    def forward(self, batch):
        self.calls += 1
        value = batch.labels[batch.labels >= 0].sum()
        loss = self.weight * value
        if self.calls <= self.from_call or not self.poison:
            return loss
        return loss * math.nan if self.poison == "loss" else loss + torch.sqrt(self.weight - self.weight.detach())


def step_inputs(loss: nn.Module, saved: list[int], **train) -> StepInputs:
    cfg = TrainConfig(**({"batch_size": 2, "learning_rate": 0.5, "max_grad_norm": 0.0} | train))
    documents = [
        Document(np.array([1, 2]), np.array([n, -100], dtype=np.int32), f"rows.jsonl:{n}") for n in range(1, 9)
    ]
    return StepInputs(
        cfg=cfg,
        accelerator=Accelerator(),
        loss=loss,
        optimizer=build_optimizer(cfg, loss.named_parameters()),
        sampler=MapSampler(documents, SequenceOrder([2] * 8, [1.0] * 8, None, cfg.batch_size, 0)),
        total_steps=4,
        is_sharded=False,
        share_prefixes=False,
        resume_command="",
        micro_batch=MicroBatch(1),
        last_checkpoint=lambda: saved[-1] if saved else None,
    )


@pytest.mark.parametrize(("poison", "named"), [("loss", "loss is nan"), ("gradient", "gradient norm is")])
def test_a_nan_stops_the_run_before_the_update_and_names_step_and_rows(poison, named):
    saved: list[int] = []
    loss = Linear(poison, from_call=4)  # two micro-batches a step: the third step is poisoned
    inputs, state, weights = step_inputs(loss, saved, save_every=1), TrainState({}, ""), []

    def save(state: TrainState) -> None:
        saved.append(state.step)
        weights.append(loss.weight.item())

    with pytest.raises(FinetuneError, match=named) as stopped:
        fit(inputs, state, tracker=SilentTracker(), save=save)
    rows = [document.location for sequence in inputs.sampler.step_batches(2) for document in sequence]
    assert "step 3" in str(stopped.value) and all(row in str(stopped.value) for row in rows)
    assert "checkpoint: 2" in str(stopped.value)
    assert saved == [1, 2] and state.step == 2
    assert loss.weight.item() == weights[-1]


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_loss_and_gradient_are_per_target_token_whatever_the_micro_batch(micro_batch):
    loss = Linear()
    result = train_step(replace(step_inputs(loss, [], batch_size=8), micro_batch=MicroBatch(micro_batch)), 1)
    assert result.loss == pytest.approx(2.0 * sum(range(1, 9)) / 8)
    assert result.grad_norm == pytest.approx(sum(range(1, 9)) / 8)
    assert (result.tokens, result.target_tokens) == (16, 8)


def test_gradients_are_clipped_to_the_norm_given_and_reported_unclipped():
    loss = Linear()
    inputs = step_inputs(loss, [], batch_size=8, max_grad_norm=0.25, eps=1.0, beta1=0.0, beta2=0.0, warmup_ratio=0.0)
    result = train_step(inputs, 1)
    assert result.grad_norm == pytest.approx(4.5)
    # AdamW without memory moves by lr * g / (|g| + eps).
    assert loss.weight.item() == pytest.approx(2.0 - 0.5 * 0.25 / 1.25, rel=1e-5)
