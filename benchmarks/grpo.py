"""Measure a step of learning from rewards, and its update alone, against TRL's GRPOTrainer.

    python -m benchmarks.grpo [size=0.5B] [layers=4] [prompts=1] [group=8] [prompt=256] [answer=64] [repeats=3]
                              [steps=2] [rows=FILE] [tokenizer=FOLDER] [ours=fast] [stock=grpo,…]

All alternate in fresh processes, at temperature 1 and without a reference. In each step the model samples `group`
answers of `answer` tokens to each of `prompts` prompts, all of a step in one forward pass, and learns from them.
Sampling includes the rewards; the update is the rest of the step. A random model almost never ends an answer:
`answer_tokens` are those of a step. Every second answer is rewarded, so that all groups have advantages. TRL's seconds
leave out the optimizer, ours are those of whole steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report, rows
from benchmarks.distill import Bar, Runs, judged, verdicts
from benchmarks.figures import Figures, medians
from benchmarks.processes import device, parse
from benchmarks.throughput import warmup_of
from benchmarks.workload import DEFAULTS, Workload, prepared

OPTIONS = {
    **{key: value for key, value in DEFAULTS.items() if key != "limit"},
    "layers": "4",
    "prompts": "1",
    "group": "8",
    "prompt": "256",
    "answer": "64",
    "steps": "2",
    "warmup": "1",
    "repeats": "3",
}
OURS = "ours"
BARS: tuple[Bar, ...] = (
    (OURS, "update_ratio", "at_least", 3.0),
    (OURS, "step_ratio", "at_least", 2.0),
)
COLUMNS = (
    ("step s", "step_seconds", 1.0, ",.2f"),
    ("sampling s", "sampling_seconds", 1.0, ",.2f"),
    ("update s", "update_seconds", 1.0, ",.2f"),
    ("answer tok", "answer_tokens", 1.0, ",.0f"),
    ("computed", "computed_tokens", 1.0, ",.0f"),
    ("peak GB", "peak_bytes", 1e-9, ".2f"),
    ("start s", "start_seconds", 1.0, ".1f"),
)
# Tokens that a template adds to a prompt, at most.
_TEMPLATE_TOKENS = 64


def run(work: Workload, side: str, name: str, file: Path) -> dict[str, Any]:
    """Run one side; all answers of a step are one forward pass."""
    prompts, group, prompt, answer = (int(work.options[key]) for key in ("prompts", "group", "prompt", "answer"))
    if side == "stock":
        return work.stock(name, prompt + answer, prompts * group, rows=file, group=group, answer=answer)
    settings = f"reward.loss=grpo;reward.group_size={group};reward.max_new_tokens={answer};data.truncation=error"
    length = prompts * (prompt + _TEMPLATE_TOKENS + group * answer)
    return work.ours(name, length, prompts, settings, rows=file, train_on="assistant", reward="true")


def alternate(work: Workload) -> Runs:
    """Run all by name, alternating.

    An uncounted run of ours first quantizes the base into the cache, for the times and peaks of all others.
    """
    options = work.options
    steps = 1 + int(options["warmup"]) + int(options["steps"])
    file = work.folder / "prompts.jsonl"
    count = steps * int(options["prompts"])
    rows.write_prompts(Path(options["rows"]), file, Path(options["tokenizer"]), int(options["prompt"]), count)
    turns = [("ours", options["ours"]), *(("stock", name) for name in work.stock_variants("grpo"))]
    run(work, *turns[0], file)
    runs: Runs = {f"{side} {name}": [] for side, name in turns}
    for _ in range(int(options["repeats"])):
        for side, name in turns:
            runs[f"{side} {name}"].append(run(work, side, name, file))
            report.log(report.table({f"{side} {name}": figures_of(work, side, runs[f"{side} {name}"][-1])}, COLUMNS))
    return runs


def figures_of(work: Workload, side: str, run: Mapping[str, Any]) -> Figures:
    """Return medians of the counted steps of a run; a failed run unchanged."""
    if "failed" in run:
        return {"failed": run["failed"]}
    steps = run["steps"][warmup_of(side, work.options) :]
    update = [step["seconds"] - step["sampling_seconds"] for step in steps]
    return {
        "step_seconds": median(step["seconds"] for step in steps),
        "sampling_seconds": median(step["sampling_seconds"] for step in steps),
        "update_seconds": median(update),
        "answer_tokens": median(step["target_tokens"] for step in steps),
        "tokens": median(step["tokens"] for step in steps),
        "computed_tokens": median(step.get("computed_tokens", step["tokens"]) for step in steps),
        **{key: run[key] for key in ("peak_bytes", "start_seconds")},
    }


def ratios(ours: Figures, stock: Mapping[str, Figures]) -> Figures:
    """Return how many times as fast as the fastest of `stock` we are, and our peak over its lowest."""
    done = [figures for figures in stock.values() if "failed" not in figures]
    if "failed" in ours or not done:
        return {}
    times = {
        f"{part}_ratio": min(figures[f"{part}_seconds"] for figures in done) / ours[f"{part}_seconds"]
        for part in ("step", "sampling", "update")
    }
    return {**times, "peak_ratio": ours["peak_bytes"] / min(figures["peak_bytes"] for figures in done)}


def summarize(work: Workload, runs: Runs) -> dict[str, Any]:
    """Return the figures of table and JSON; ratios are of medians, `by_turn` has the single repetitions."""
    each = {name: [figures_of(work, name.partition(" ")[0], done) for done in some] for name, some in runs.items()}
    lines = {name: medians(turns) for name, turns in each.items()}
    [ours] = [name for name in lines if name.startswith("ours ")]
    stock = {name: line for name, line in lines.items() if name != ours}
    found = {**lines[ours], **ratios(lines[ours], stock)}
    return {
        "ours": found,
        "stock": {name.removeprefix("stock "): line for name, line in stock.items()},
        "by_turn": [ratios(turn, {name: each[name][i] for name in stock}) for i, turn in enumerate(each[ours])],
        "against": {name.removeprefix("stock "): ratios(lines[ours], {name: line}) for name, line in stock.items()},
        "bars": judged({OURS: found}, BARS),
        "runs": runs,
    }


def describe(summary: Mapping[str, Any]) -> str:
    lines = {"ours": summary["ours"], **{f"stock {name}": line for name, line in summary["stock"].items()}}
    return "\n".join([report.table(lines, COLUMNS), *verdicts(summary["bars"])])


def main(words: list[str]) -> None:
    options = parse(words, OPTIONS, prefixes=("ours.",))
    machine = device()
    with prepared(options) as work:
        if len(work.ours_variants()) != 1:
            raise SystemExit(f"ours={options['ours']}: set exactly one")
        summary = {**report.heading("grpo", work.options, machine), **summarize(work, alternate(work))}
    report.conclude("grpo", options, machine, summary, describe(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
