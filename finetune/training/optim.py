"""The optimizer and the learning rate, the latter a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn import Parameter

from finetune.config.schema import TrainConfig


def build_optimizer(cfg: TrainConfig, named_parameters: Iterable[tuple[str, Parameter]]) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in the order given; their names label the optimizer's saved state.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    return torch.optim.AdamW(
        trainable, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay
    )


def warmup_steps(cfg: TrainConfig, total_steps: int) -> int:
    """Steps of linear warm-up: a share of the run below 1, a number of steps from 1 on."""
    if cfg.warmup_steps is None:
        return math.ceil(cfg.warmup_ratio * total_steps)
    return min(cfg.warmup_steps, total_steps)


def learning_rate_at(cfg: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of the update that ends step `step` (from 1 to total_steps).

    Warm-up rises linearly to the peak at its last step; cosine and linear then fall towards 0, which they would reach
    one step after the last, so that no update is wasted.
    """
    warmup = warmup_steps(cfg, total_steps)
    if step <= warmup:
        return cfg.learning_rate * step / warmup
    progress = (step - warmup - 1) / max(1, total_steps - warmup)
    share = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[cfg.schedule]
    return cfg.learning_rate * share
