"""How long a run takes: seconds of a step, steps of the run, and where each figure comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config.command_options import PlanOptions
from finetune.config.schema import RunConfig
from finetune.planning.flops import step_work
from finetune.planning.peak_memory import Footprint
from finetune.planning.timing import Rates, assumed_ceiling, assumed_seconds, step_seconds

# Bytes of a row's file for each token: English chat rows in JSON with Qwen2.5's vocabulary (GSM8K: 4.3).
_BYTES_A_TOKEN = 4.3
_TEXT_FILES = (".jsonl", ".json", ".csv")


def look_ahead(
    cfg: RunConfig,
    shape: Mapping[str, Any],
    found: Footprint,
    ranks: int,
    *,
    rates: Rates | None,
    options: PlanOptions,
    gpu_name: str | None,
) -> dict[str, Any]:
    """Figures of a plan's time. rates: measured ones, None where there are none or others are to be taken."""
    work = step_work(
        cfg,
        shape,
        found.micro_batch,
        found.recomputed,
        ranks=ranks,
        document_tokens=options.document_tokens,
        target_share=options.target_share,
    )
    if options.tflops:
        seconds = assumed_seconds(work, options.tflops * 1e12, found.device_type)
        words = f"given: {options.tflops:g} TFLOP/s"
    elif rates is not None:
        seconds = step_seconds(work, shape, rates, options.document_tokens or cfg.data.max_length)
        words = f"measured on {rates.device}"
    else:
        ceiling, words = assumed_ceiling(found.device_type, gpu_name)
        seconds = assumed_seconds(work, ceiling, found.device_type)
        words += "; finetune plan calibrate=true measures, tflops=N gives it"
    total = sum(seconds.values())
    steps, source = steps_of(cfg, options.tokens)
    return {
        "step_flops": work.flops * ranks,
        "rates": words,
        "step_seconds": total,
        "seconds_shares": {name: part / total for name, part in seconds.items()},
        "tokens_per_second": cfg.train.batch_size * cfg.data.max_length / total,
        "steps": steps,
        "steps_from": source,
        "total_seconds": None if steps is None else steps * total,
    }


def steps_of(cfg: RunConfig, tokens: int | None) -> tuple[int | None, str]:
    """Optimizer steps of a run, and where the number comes from; None where neither setting nor files tell.

    tokens: of an epoch, if the user said so.
    """
    if cfg.train.max_steps is not None:
        return cfg.train.max_steps, ""
    source = ""
    if tokens is None:
        tokens = _tokens_in_files(cfg)
        source = " (estimated from the files' size)"
    if tokens is None:
        return None, ""
    a_step = cfg.train.batch_size * cfg.data.max_length
    return max(1, math.ceil((cfg.train.epochs or 1) * tokens / a_step)), source


def _tokens_in_files(cfg: RunConfig) -> int | None:
    """About how many tokens an epoch has; None unless all sources are plain local files read as a whole."""
    total = 0.0
    for source in cfg.data.train:
        file = Path(source.path).expanduser()
        if not file.is_file() or file.suffix not in _TEXT_FILES or source.limit is not None:
            return None
        total += file.stat().st_size / _BYTES_A_TOKEN * source.weight
    return round(total)
