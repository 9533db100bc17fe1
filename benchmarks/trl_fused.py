"""Compare TRL's SFTTrainer with and without `finetune.fuse_layers`, alternating in fresh processes.

    python -m benchmarks.trl_fused [size=0.5B] [rows=FILE] [tokenizer=FOLDER] [repeats=3] [steps=4] [length=512]
                                   [batch=1] [stock=all]

Both sides train `batch` packs (or rows) of up to `length` tokens per step with the same settings. One step is warm-up.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import report
from benchmarks.figures import Figures, compare, medians, run_figures
from benchmarks.processes import device, parse
from benchmarks.workload import DEFAULTS, Workload, prepared

OPTIONS = {
    **{key: value for key, value in DEFAULTS.items() if key not in ("ours", "warmup")},
    "repeats": "3",
    "length": "512",
    "batch": "1",
}
SIDES = {"stock": "false", "fused": "true"}


def alternate(work: Workload) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return all runs by variant of the stock trainer and side."""
    length, batch = int(work.options["length"]), int(work.options["batch"])
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for _ in range(int(work.options["repeats"])):
        for variant in work.stock_variants():
            for side, fused in SIDES.items():
                run = work.stock(variant, length, batch, fused=fused)
                runs.setdefault(variant, {}).setdefault(side, []).append(run)
                report.log(report.table({f"{variant} {side}": run_figures(run, 1, work.shape)}))
    return runs


def summarize(work: Workload, runs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Return the medians of each variant, with the ratios of fused to stock layers."""
    variants = {}
    for variant, sides in runs.items():
        lines: dict[str, Figures] = {
            side: medians([run_figures(run, 1, work.shape) for run in done]) for side, done in sides.items()
        }
        variants[variant] = {**lines, **compare(lines["fused"], {"stock": lines["stock"]})}
    return {"variants": variants, "runs": runs}


def describe(summary: dict[str, Any]) -> str:
    lines = {f"{name} {side}": v[side] for name, v in summary["variants"].items() for side in SIDES}
    ratios = [
        f"{name}: fused layers train {v['ratio']:.2f} times the tokens/s at {v['peak_ratio']:.2f} of the peak memory"
        for name, v in summary["variants"].items()
        if v["ratio"]
    ]
    return "\n".join([report.table(lines), *ratios])


def main(words: list[str]) -> None:
    options = parse(words, OPTIONS)
    machine = device()
    with prepared(options) as work:
        # Stock's steps need no warm-up beyond the first, which `Workload.stock` adds.
        summary = {**report.heading("trl_fused", work.options, machine), **summarize(work, alternate(work))}
    report.conclude("trl-fused", options, machine, summary, describe(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
