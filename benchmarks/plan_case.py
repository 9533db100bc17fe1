"""Measure one training run: memory above that of the process before it, and seconds per step.

    python -m benchmarks.plan_case config=RUN.yaml [set=key=value;…] [do=train|cache|calibrate]

On a CPU: the highest resident size minus that after all imports, and CPU seconds per step on one thread, which other
programs on the same cores hardly change. On CUDA: the peak of allocated bytes, and wall time. do=cache writes the
teacher outputs of the config instead; do=calibrate measures the machine with the same clock.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.ours import split_training
from benchmarks.peaks import Peaks
from benchmarks.processes import parse

DEFAULTS = {"config": "", "set": "", "do": "train"}


def clock() -> float:
    """Return CPU seconds of this process; on CUDA, wall time."""
    import torch

    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def resident_bytes() -> int:
    """Return the resident size; 0 on CUDA, where the allocator counts from 0."""
    import torch

    if torch.cuda.is_available():
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def vary_rewards() -> None:
    """Reward every second answer. Answers of random weights fail alike, and training leaves such groups out."""
    import numpy as np

    from finetune.objectives.rollouts import Rollouts

    judged = Rollouts._groups

    def groups(self: Rollouts, prompts: Any) -> Any:
        found = judged(self, prompts)
        for group in found:
            group.rewards[:] = (np.arange(len(group.answers)) % 2)[:, None]
        return found

    Rollouts._groups = groups


def run_training(config: str, overrides: list[str]) -> dict[str, Any]:
    """Return peaks, baseline and steps of a run."""
    import bitsandbytes.functional  # noqa: F401 - later imports of a run count as libraries
    import peft  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from finetune import load_config
    from finetune.towers.towers import Towers
    from finetune.training import loop
    from finetune.training.recipe import train

    baseline = resident_bytes()
    cfg = load_config(config, overrides)
    peaks, steps, train_step = Peaks(), [], loop.train_step
    fill, media_seconds = Towers.fill, [0.0]
    split_training(peaks)
    vary_rewards()

    def timed(inputs: loop.StepInputs, step: int, stop_signal: int = 0) -> loop.StepResult:
        start = clock()
        result = train_step(inputs, step, stop_signal)
        counts = {key: getattr(result, key) for key in ("tokens", "computed_tokens", "target_tokens")}
        steps.append({"seconds": clock() - start, **counts})
        return result

    def timed_fill(*arguments: Any) -> None:
        start = clock()
        fill(*arguments)
        media_seconds[0] += clock() - start

    loop.train_step, Towers.fill = timed, timed_fill
    train(cfg)
    return {**peaks.figures(), "baseline_bytes": baseline, "steps": steps, "media_seconds": media_seconds[0]}


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    overrides = [word for word in options["set"].split(";") if word]
    result: dict[str, Any] = {}
    if options["do"] == "train":
        result = run_training(options["config"], overrides)
    elif options["do"] == "calibrate":
        from finetune.commands.plan import calibrate

        calibrate(clock)
    else:
        from finetune.cli import main as finetune

        if code := finetune(["cache", f"config={options['config']}", *overrides]):
            raise SystemExit(code)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
