"""Measure what the embedded base learns from rewards alone: `grpo.yaml`, with several seeds.

    python -m benchmarks.reward_learning [seeds=0,1,2] [loss=dapo] [steps=50]

The reward is 1 for an answer that equals the row's, which training never shows. `reward` is that of greedy answers to
the held-out prompts, so it is their exact match. `sampled` and `tokens` are means over the first and the last five
steps. A bar is on the worst seed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import report
from benchmarks.distill import Bar, judged, verdicts
from benchmarks.processes import device, parse

DEFAULTS = {"seeds": "0,1,2", "loss": "dapo", "steps": "50", "results": "benchmarks/results"}
BARS: tuple[Bar, ...] = (
    ("base", "reward", "at_least", 0.10),
    ("base", "reward", "at_most", 0.40),
    ("trained", "reward", "at_least", 0.85),
)
COLUMNS = (
    ("reward", "reward_before", 100.0, ".1f"),
    ("after", "reward", 100.0, ".1f"),
    ("sampled", "sampled_first", 100.0, ".1f"),
    ("last", "sampled_last", 100.0, ".1f"),
    ("tokens", "tokens_first", 1.0, ".2f"),
    ("last", "tokens_last", 1.0, ".2f"),
    ("gap, nats", "sampling_gap", 1.0, ".3f"),
    ("sampling", "sampling_share", 100.0, ".0f"),
    ("steps", "steps", 1.0, ".0f"),
    ("seconds", "seconds", 1.0, ".0f"),
)
_ENDS = 5  # steps at each end


def run(folder: Path, seed: str, options: dict[str, str]) -> dict[str, float]:
    """Train once, and return its figures."""
    from finetune import load_config, train

    settings = (f"train.seed={seed}", f"reward.loss={options['loss']}", f"train.max_steps={options['steps']}")
    result = train(load_config("grpo.yaml", [*settings, f"output_dir={folder}"]))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = steps[:_ENDS], steps[-_ENDS:]
    assert result.reward_before is not None and result.reward_after is not None, "grpo.yaml has held-out prompts"
    return {
        "reward_before": result.reward_before,
        "reward": result.reward_after,
        "sampled_first": mean(step["train/reward"] for step in first),
        "sampled_last": mean(step["train/reward"] for step in last),
        "tokens_first": mean(step["train/answer_tokens"] for step in first),
        "tokens_last": mean(step["train/answer_tokens"] for step in last),
        "sampling_gap": max(step.get("train/sampling_gap", 0.0) for step in steps),
        "sampling_share": sum(step["train/sampling_seconds"] for step in steps) / result.train_seconds,
        "steps": result.steps,
        "seconds": result.train_seconds,
    }


def summarize(runs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return the figures of each seed, and the verdicts on the bars."""
    found = {
        "base": {"reward": next(iter(runs.values()))["reward_before"]},
        "trained": {"reward": min(figures["reward"] for figures in runs.values())},
    }
    return {"seeds": runs, **found, "bars": judged(found, BARS)}


def main(words: list[str]) -> None:
    options, machine = parse(words, DEFAULTS), device()
    runs: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as work:
        for seed in options["seeds"].split(","):
            runs[f"seed {seed}"] = run(Path(work) / seed, seed, options)
            report.log(report.table(runs, COLUMNS))
    summary = {**report.heading("reward-learning", options, machine), **summarize(runs)}
    report.log("\n" + "\n".join(verdicts(summary["bars"])))
    report.write(report.results_file("reward-learning", options, machine), summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
