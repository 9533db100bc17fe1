"""The limits of a search: what the planner predicts of a candidate before it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.config.command_options import PlanOptions
from finetune.config.schema import RunConfig
from finetune.planning.auto_batch import estimate_memory, keep_copies
from finetune.planning.gpus import PlannedDevice, traits_of
from finetune.planning.inputs import plan_inputs
from finetune.planning.sharded_base import shard_group
from finetune.planning.static_memory import plan_memory
from finetune.planning.timing import Rates, estimate_time
from finetune.system.format import format_bytes, format_duration
from finetune.system.machine import nodes_of_run, ranks_of_run

_ONLY_IN_TRAINING = ("gradients", "optimizer", "16-bit copies of 4-bit linears")


@dataclass(frozen=True)
class Prediction:
    """What the planner predicts of a run.

    Attributes:
        needed_bytes: free memory for a safe run on one rank: the peak with the planner's margin.
        seconds: of all steps; None if their number is unknown.
        stored_bytes: of the model as it is served: the base in its bits, and the adapter in fp32.
    """

    needed_bytes: float
    seconds: float | None
    stored_bytes: float

    def __str__(self) -> str:
        time = "unknown" if self.seconds is None else format_duration(self.seconds)
        return f"needed memory={format_bytes(self.needed_bytes)}, time={time}, stored={format_bytes(self.stored_bytes)}"


@dataclass(frozen=True)
class Limits:
    """Limits of one run; None: no limit."""

    memory_bytes: float | None
    seconds: float | None

    def broken_by(self, found: Prediction) -> list[str]:
        """Return the keys of the limits that a run is over."""
        over = []
        if self.memory_bytes is not None and found.needed_bytes > self.memory_bytes:
            over.append("sweep.memory_gb")
        if self.seconds is not None and (found.seconds or 0.0) > self.seconds:
            over.append("sweep.hours")
        return over

    def __str__(self) -> str:
        memory = "unknown" if self.memory_bytes is None else format_bytes(self.memory_bytes)
        return f"memory={memory}, time={'none' if self.seconds is None else format_duration(self.seconds)}"


@dataclass(frozen=True)
class Planner:
    """Predicts runs of one model on one device, as `finetune plan` does.

    Attributes:
        shape: of the model, keys as in config.json.
        device: its free memory is that of the limit.
        rates: measured rates of this machine, None if there are none.
        document_tokens: mean of the rows; None if they are unknown.
        target_share: trained share of the tokens.
    """

    shape: Mapping[str, Any]
    device: PlannedDevice
    rates: Rates | None
    document_tokens: int | None = None
    target_share: float = 1.0

    def predict(self, cfg: RunConfig) -> Prediction:
        """Predict a run."""
        kind, free, _, gpu_name = self.device
        ranks = cfg.train.world_size or ranks_of_run(os.environ)
        gpu, nodes = traits_of(gpu_name), nodes_of_run(os.environ)
        inputs = plan_inputs(cfg, self.shape, device_type=kind, ranks=ranks, gpu=gpu, nodes=nodes)
        inputs = inputs.with_rows(self.document_tokens, self.target_share)
        inputs = keep_copies(replace(inputs, shard_ranks=shard_group(inputs, free)), free)
        memory = estimate_memory(inputs, free)
        time = estimate_time(inputs, memory, rates=self.rates, options=PlanOptions(), gpu_name=gpu_name)
        return Prediction(memory.needed_bytes, time["total_seconds"], stored_bytes(cfg, self.shape))


def stored_bytes(cfg: RunConfig, shape: Mapping[str, Any]) -> float:
    """Return the bytes of the trained model as it is served, without towers: the planner's static memory but for what
    only training holds (gradients, moments, copies)."""
    parts = plan_memory(shape, cfg.model, cfg.quant, cfg.lora, cfg.train.optimizer).parts
    return sum(size for name, size in parts.items() if name not in _ONLY_IN_TRAINING)
