"""The optimizer of a run and its learning rate at every step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch.nn import Parameter

from finetune.config.schema import TrainConfig
from finetune.system.accelerator import on_gpu


def build_optimizer(cfg: TrainConfig, named_parameters: Iterable[tuple[str, Parameter]]) -> torch.optim.Optimizer:
    """Build AdamW or Lion over the trainable parameters, in the order given. Their names label its saved state.

    With `train.lora_plus_ratio` the B matrices of LoRA form a group with a `rate_factor`.

    Sources: AdamW, Loshchilov & Hutter 2019, arXiv:1711.05101. 8-bit moments, Dettmers et al. 2022, arXiv:2110.02861.
    Paged moments, Dettmers et al. 2023, arXiv:2305.14314. LoRA+, Hayou et al. 2024, arXiv:2402.12354. Lion, Chen et al.
    2023, arXiv:2302.06675.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    groups = [{"params": trainable, "rate_factor": 1.0}]
    if cfg.lora_plus_ratio is not None:
        of_b = [(name, parameter) for name, parameter in trainable if ".lora_B." in name]
        rest = [(name, parameter) for name, parameter in trainable if ".lora_B." not in name]
        groups = [{"params": rest, "rate_factor": 1.0}, {"params": of_b, "rate_factor": cfg.lora_plus_ratio}]
    settings = {"lr": cfg.learning_rate, "betas": (cfg.beta1, cfg.beta2), "weight_decay": cfg.weight_decay}
    if not cfg.optimizer.startswith("lion"):  # which divides by nothing
        settings["eps"] = cfg.eps
    if cfg.optimizer == "adamw":
        # On a GPU torch's own choice makes temporaries of the size of all moments; the fused one makes none.
        fused = bool(trainable) and all(on_gpu(parameter) for _, parameter in trainable)
        return torch.optim.AdamW(groups, **settings, fused=fused or None)
    import bitsandbytes

    kinds = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
        "lion": bitsandbytes.optim.Lion32bit,
        "lion_8bit": bitsandbytes.optim.Lion8bit,
    }
    # A CPU has no other memory to page to.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU", category=UserWarning)
    return kinds[cfg.optimizer](groups, **settings)


def warmup_steps(cfg: TrainConfig, total_steps: int) -> int:
    """Return the number of warm-up steps."""
    if cfg.warmup_steps is None:
        return math.ceil(cfg.warmup_ratio * total_steps)
    return min(cfg.warmup_steps, total_steps)


def learning_rate_at(cfg: TrainConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of step `step` (1 to total_steps), a pure function of the step.

    Warm-up rises linearly and reaches the peak at its last step. Then the rate falls as `train.schedule` says, to
    `train.min_lr_ratio` of the peak one step after the last, so that every update has an effect.
    """
    warmup = warmup_steps(cfg, total_steps)
    if step <= warmup:
        return cfg.learning_rate * step / warmup
    done, steps = step - warmup - 1, max(1, total_steps - warmup)
    progress = done / steps
    if cfg.schedule == "wsd":
        decay = max(1, math.ceil(cfg.decay_ratio * total_steps))
        progress = max(0.0, (done - (steps - decay)) / decay)
    shares = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "wsd": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "inverse_sqrt": math.sqrt(max(warmup, 1) / (max(warmup, 1) + done)),
    }
    share = shares[cfg.schedule]
    if cfg.min_lr_ratio and cfg.schedule in ("linear", "cosine", "wsd"):
        share = cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * share
    return cfg.learning_rate * share
