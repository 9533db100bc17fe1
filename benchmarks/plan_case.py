"""One training run whose memory is counted above what the process held before it, and whose steps are timed.

    python -m benchmarks.plan_case config=RUN.yaml [set=key=value;…] [do=train|cache|calibrate]

On a CPU: the highest resident size less what is resident once all libraries are imported; on CUDA the allocator's
highest count. `reference` is how many operations a second one product reaches before and after the run, so that steps
can be compared with a calibration made while the machine was busier or idler. do=cache writes the teacher's signal of the config instead, and
do=calibrate measures the machine.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.ours import split_training
from benchmarks.peaks import Peaks
from benchmarks.processes import parse

DEFAULTS = {"config": "", "set": "", "do": "train"}
_REPEATS = 5


def resident_bytes() -> int:
    """Resident now, by Linux; 0 on CUDA, where the allocator counts from 0."""
    import torch

    if torch.cuda.is_available():
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def reference_rate() -> float:
    """Operations a second of the product of 0.5B's MLP with 1,024 rows."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = (torch.ones(n, 896, dtype=torch.bfloat16, device=device) for n in (1024, 4864))

    def once() -> float:
        start = time.perf_counter()
        x @ weight.T
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return 2.0 * 1024 * 896 * 4864 / median(once() for _ in range(_REPEATS))


def run_training(config: str, overrides: list[str]) -> dict[str, Any]:
    """Peaks, baseline and steps of a run."""
    import bitsandbytes.functional  # noqa: F401 - what a run imports on its way belongs to the libraries
    import peft  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from finetune import load_config
    from finetune.training.capacity import use_all_cores
    from finetune.training.recipe import train

    baseline = resident_bytes()
    cfg = load_config(config, overrides)
    peaks = Peaks()
    split_training(peaks)
    use_all_cores("cpu")
    reference = [reference_rate()]
    train(cfg)
    figures = peaks.figures()
    reference.append(reference_rate())
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    steps = [{key: step[key] for key in ("seconds", "tokens", "computed_tokens")} for step in map(json.loads, lines)]
    return {**figures, "baseline_bytes": baseline, "steps": steps, "reference": median(reference)}


def run_calibration() -> dict[str, Any]:
    """The product's rate around a calibration, which is kept."""
    from finetune.plan_command import calibrate
    from finetune.training.capacity import use_all_cores

    use_all_cores("cpu")
    reference = [reference_rate()]
    calibrate()
    reference.append(reference_rate())
    return {"reference": median(reference)}


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    overrides = [word for word in options["set"].split(";") if word]
    if options["do"] == "train":
        result = run_training(options["config"], overrides)
    elif options["do"] == "calibrate":
        result = run_calibration()
    else:
        from finetune.cli import main as finetune

        if code := finetune(["cache", f"config={options['config']}", *overrides]):
            raise SystemExit(code)
        result = {}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
