"""Run the package's own training step over fake tensors on cuda:0: shapes, devices and dtypes without values.

A 7B with 340,000 tokens takes seconds. Fake kernels have no inside: `Tracker` adds the workspace of flash attention by
formula. Not traced: streams, time, what the allocator reserves beside what it hands out (cuBLAS workspaces too).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.config.schema import LoraConfig, QuantConfig, TrainConfig
from finetune.data.batch import Batch, build_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.losses.cross_entropy import CrossEntropy
from finetune.ops.attention import SEGMENTED
from finetune.ops.determinism import deterministic
from finetune.training.optimizer import build_optimizer
from tests.cuda_trace.fake_gpu import build_base, build_model, fake_gpu
from tests.cuda_trace.roofline import Kernel
from tests.cuda_trace.tracker import Tracker

# Builds the loss of a model, which is called with this batch at every step.
BuildLoss = Callable[[nn.Module, Batch], nn.Module]
# Runs a model on a batch; calls `start_measuring` where the figures begin.
Work = Callable[[nn.Module, Batch, Tracker], None]

_FIRST_STEP_TOKENS = 64


def documents(tokens: int, count: int = 1, share: float = 1.0) -> list[Document]:
    """Return documents of nearly equal length; the last share of each one's tokens are targets."""
    made = []
    for i in range(count):
        length = tokens // count + (i < tokens % count)
        labels = np.full(length, IGNORE_INDEX, dtype=np.int32)
        trained = max(1, int(length * share))
        labels[length - trained :] = 5
        made.append(Document((np.arange(length, dtype=np.int32) * 7 + 13 * i) % 1000 + 100, labels, f"row {i}"))
    return made


@dataclass
class Step:
    """What one training step does on a GPU; bytes of all tensors.

    static: after loading. peak: highest of the step. host_peak: likewise in main memory. largest: at the peak, by line.
    launches: kernels by phase. syncs: places where the CPU waits for the GPU. widest: values of the largest new tensor.
    kernels: how often each one runs.
    names: of its operations. fixed: of those that run with torch's deterministic algorithms.
    """

    static: int
    peak: int
    host_peak: int
    largest: list[tuple[str, int]]
    launches: dict[str, int]
    syncs: dict[str, int]
    widest: int
    kernels: dict[Kernel, int]
    names: list[str]
    fixed: list[str]


def trace(
    shape: Mapping[str, Any],
    work: Work,
    *,
    tokens: int = 2048,
    count: int = 1,
    share: float = 1.0,
    change: Callable[[Document], Document] = lambda row: row,
    lora: LoraConfig | None = None,
    quant: QuantConfig | None = None,
    recompute: str | int = "none",
    embedding: str = "device",
    kernels: str = "fused",
    attention: str = SEGMENTED,
    compiled: bool = True,
    capability: tuple[int, int] = (9, 0),
    fixed_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Step:
    """Trace work on a model, with a batch of `count` documents, `tokens` in total, of which a share are targets.

    change: makes the rows of the batch from such documents. fixed_order: `train.deterministic`.
    """
    rows, tracker = documents(tokens, count, share), Tracker()
    with fake_gpu(tracker, capability, compiled), deterministic(fixed_order):
        base = build_base(shape, quant or QuantConfig(), attention, embedding, dtype)
        model = build_model(base, lora or LoraConfig(), recompute, kernels)
        gc.collect()
        static = tracker.now
        tracker.start_measuring()
        tracker.phase = "batch"
        work(
            model,
            build_batch([change(row) for row in rows], share_prefixes=attention == SEGMENTED and kernels == "fused"),
            tracker,
        )
    return Step(
        static=static,
        peak=tracker.peak,
        host_peak=tracker.host_peak,
        largest=tracker.largest(),
        launches=dict(tracker.launches),
        syncs=dict(tracker.syncs),
        widest=tracker.widest,
        kernels=dict(tracker.kernels),
        names=sorted(tracker.names),
        fixed=sorted(tracker.fixed),
    )


def trace_step(
    shape: Mapping[str, Any],
    *,
    build_loss: BuildLoss | None = None,
    train: TrainConfig | None = None,
    **settings: Any,
) -> Step:
    """Trace the second step of a run: the first one allocates moments and buffers. settings: as for `trace`.

    build_loss: its teacher may have targets of one batch only, the batch of both steps; without it the first is short.
    """

    def work(model: nn.Module, batch: Batch, tracker: Tracker) -> None:
        loss = build_loss(model, batch) if build_loss else CrossEntropy(model)
        optimizer = build_optimizer(train or TrainConfig(), model.named_parameters())
        for group in optimizer.param_groups:
            group["foreach"] = not group.get("fused")  # torch's own choice on CUDA, which it does not make here
        _train_step(tracker, loss, optimizer, batch if build_loss else build_batch(documents(_FIRST_STEP_TOKENS)))
        gc.collect()
        tracker.start_measuring()
        _train_step(tracker, loss, optimizer, batch)

    return trace(shape, work, **settings)


def _train_step(tracker: Tracker, loss: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One step of one batch, as training/loop.py makes it."""
    tracker.phase = "forward"
    value = loss(batch)
    tracker.phase = "backward"
    (value / batch.tokens).backward()
    tracker.phase = "loss"
    value.item()
    del value
    tracker.phase = "optimizer"
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
