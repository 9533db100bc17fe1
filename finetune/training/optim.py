"""Build the optimizer; compute the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn import Parameter

from finetune.config.schema import TrainConfig


def build_optimizer(cfg: TrainConfig, named_parameters: Iterable[tuple[str, Parameter]]) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, in the order given. Their names label its saved state.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    return torch.optim.AdamW(
        trainable, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay
    )


def warmup_steps(cfg: TrainConfig, total_steps: int) -> int:
    """Return the number of warm-up steps."""
    if cfg.warmup_steps is None:
        return math.ceil(cfg.warmup_ratio * total_steps)
    return min(cfg.warmup_steps, total_steps)


def learning_rate_at(cfg: TrainConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of step `step` (1 to total_steps).

    Warm-up rises linearly and reaches the peak at its last step. Cosine and linear then fall, and would reach 0 one
    step after the last, so that every update has an effect.
    """
    warmup = warmup_steps(cfg, total_steps)
    if step <= warmup:
        return cfg.learning_rate * step / warmup
    progress = (step - warmup - 1) / max(1, total_steps - warmup)
    share = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[
        cfg.schedule
    ]
    return cfg.learning_rate * share
