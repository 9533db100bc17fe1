"""What a run will do and hold, in words: for `--dry-run` and for the first lines of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from finetune.config.compose import to_yaml
from finetune.config.schema import RunConfig
from finetune.models.families import shape_of
from finetune.planning.memory import plan_memory


def derive_micro_batch(cfg: RunConfig, ranks: int) -> int:
    """Sequences a forward pass on one rank: as given, or as many as fit 8,192 tokens, at least one."""
    per_rank = max(1, cfg.train.batch_size // ranks)
    if cfg.train.micro_batch_size is not None:
        return min(cfg.train.micro_batch_size, per_rank)
    return max(1, min(per_rank, 8192 // cfg.data.max_length))


def describe_plan(cfg: RunConfig, shape: Mapping[str, Any] | None, ranks: int) -> str:
    """The plan as lines of text; shape None when the model's numbers are not known without a download."""
    micro = derive_micro_batch(cfg, ranks)
    lines = [
        f"batch: {cfg.train.batch_size} sequences of up to {cfg.data.max_length} tokens a step, "
        f"{ranks} rank(s), {micro} a forward pass",
        f"length: {f'{cfg.train.max_steps} steps' if cfg.train.max_steps else f'{cfg.train.epochs or 1:g} epoch(s)'}",
    ]
    if shape is None:
        return "\n".join(
            [*lines, f"model: the shapes of {cfg.model.name} are not known here, so memory is not planned"]
        )
    plan = plan_memory(shape, cfg.model, cfg.quant, cfg.lora)
    return "\n".join([
        *lines,
        f"model: {plan.parameters:,} parameters, {plan.trained:,} trained ({plan.trained / plan.parameters:.3%})",
        f"memory before activations: {plan.total_bytes / 2**30:.2f} GiB a rank (linears in {cfg.quant.type} "
        f"{plan.quantised_bytes / 2**30:.2f}, embeddings, head and norms {plan.unquantised_bytes / 2**30:.2f}, "
        f"adapter with gradients and optimizer {plan.adapter_bytes / 2**30:.2f})",
    ])  # fmt: skip


def dry_run(cfg: RunConfig) -> str:
    """The resolved YAML and, as comments, the plan; nothing is loaded, nothing is written."""
    plan = describe_plan(cfg, shape_of(cfg.model.name), ranks=int(os.environ.get("WORLD_SIZE", "1")))
    return "\n".join([to_yaml(cfg).rstrip(), "", *(f"# {line}" for line in plan.splitlines())])
