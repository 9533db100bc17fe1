"""Whether ranks share one copy of the frozen base, so that a model larger than one GPU fits."""

from __future__ import annotations

from dataclasses import replace

from finetune.config.parallel_rules import shared_base
from finetune.planning.auto_batch import estimate_memory
from finetune.planning.inputs import PlanInputs

_MOST_RANKS = 64


def shard_group(inputs: PlanInputs, free_bytes: float | None) -> int:
    """Return the ranks that hold one copy of the base together: 1 if each holds a whole one.

    `parallel.shard=auto` shares the base where a whole copy does not fit beside the run.

    Args:
        inputs: of a run with whole copies (`shard_ranks=1`); `replace(inputs, shard_ranks=…)` is the run that results.
        free_bytes: device memory that is free before the run loads, the least of all ranks; None if unknown.
    """
    shard = inputs.parallel.shard
    if shard == "hybrid":
        return inputs.ranks // inputs.nodes
    if shard == "auto":
        fits = not inputs.shape or free_bytes is None or estimate_memory(inputs, free_bytes).needed_bytes <= free_bytes
        shard = "none" if fits or not _can_shard(inputs) else "full"
    return inputs.ranks if shard == "full" else 1


def fewest_ranks(inputs: PlanInputs, free_bytes: float) -> int | None:
    """Return the smallest number of ranks on which the run fits if they share the base; None if none up to 64 does.

    free_bytes: of each rank.
    """
    if inputs.parallel.shard == "none" or not _can_shard(inputs):
        return None
    tried = (replace(inputs, ranks=ranks, nodes=1, shard_ranks=ranks) for ranks in range(1, _MOST_RANKS + 1))
    found = (run.ranks for run in tried if estimate_memory(run, free_bytes).needed_bytes <= free_bytes)
    return next(found, None)


def _can_shard(inputs: PlanInputs) -> bool:
    """Return whether `parallel.shard=full` accepts this base."""
    full = inputs.parallel.model_copy(update={"shard": "full"})
    return not any(shared_base(inputs.model, inputs.quant, full))
