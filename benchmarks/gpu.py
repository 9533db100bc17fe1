"""Measure everything on one GPU in ten minutes, without installing or downloading.

    python -m benchmarks.gpu [size=7B] [minutes=9.5] [parts=throughput,recompute,peers,context] [lengths=2048,8192]

Each run is a process with a time limit. Failures are recorded, and the other runs continue. The results file is written
after every run, so an interrupted benchmark keeps its results. Runs without time left are recorded as failed.
Without a GPU it runs on the CPU, where `size=tiny` checks the harness within two minutes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks import report
from benchmarks.figures import Figures, ceiling_of, compare, medians, run_figures, share_of_ceiling
from benchmarks.processes import device, measure, parse
from benchmarks.stock import PEERS
from benchmarks.workload import DEFAULTS, Workload, prepared

OPTIONS = {
    **DEFAULTS,
    "size": "7B",
    "minutes": "9.5",
    "stock": "packing+checkpointing,packing",
    "steps": "3",
    "warmup": "3",
    "lengths": "2048,8192",
    "parts": "throughput,recompute,peers,context",
    "budgets": "16,24,80",
    "repeats": "1",
    "recompute": "auto,all,offload",
    "context_seconds": "60",
    "context_most": "400000",
    "run_seconds": "150",
    "ceiling_seconds": "0.3",
}
# Unsloth's documentation: longest context of Llama-3.1-8B QLoRA, rank 32 on all linears, one row per batch.
PUBLISHED_TOKENS = {"16": 40_724, "24": 78_475, "80": 342_733}
Run = tuple[str, Callable[[Workload], dict[str, Any]]]


def planned(options: Mapping[str, str]) -> Iterator[Run]:
    """Return every run by name, the most important first. `repeats` alternates the throughput runs."""
    parts = options["parts"].split(",")
    lengths = [int(length) for length in options["lengths"].split(",")]
    stock = [name for name in options["stock"].split(",") if name not in ("", "none")]
    if "throughput" in parts:
        for _ in range(int(options["repeats"])):
            for length in lengths:
                yield from ((f"ours {name} {length}", _ours(name, length)) for name in options["ours"].split(","))
                yield from ((f"stock {name} {length}", _stock(name, length)) for name in stock)
    if "recompute" in parts:
        for policy in options["recompute"].split(","):
            yield f"recompute {policy} {lengths[-1]}", _ours("fast", lengths[-1], policy)
    if "peers" in parts:
        yield from ((f"peer {name} {lengths[0]}", _stock(name, lengths[0])) for name in PEERS)
    if "context" in parts:
        yield from ((f"context {budget}", _context(budget)) for budget in options["budgets"].split(","))


def _ours(name: str, length: int, policy: str = "") -> Callable[[Workload], dict[str, Any]]:
    def run(work: Workload) -> dict[str, Any]:
        settings = ";".join(
            filter(None, [work.variant(name), f"train.gradient_checkpointing={policy}" if policy else ""])
        )
        return work.ours(name, length, 1, set=settings)

    return run


def _stock(name: str, length: int) -> Callable[[Workload], dict[str, Any]]:
    return lambda work: work.stock(name, length, 1)


def _context(budget: str) -> Callable[[Workload], dict[str, Any]]:
    def run(work: Workload) -> dict[str, Any]:
        seconds = float(work.options["context_seconds"])
        options = {
            "model": work.model,
            "budget_gb": budget,
            "seconds": seconds,
            "most": work.options["context_most"],
            "first": work.options["lengths"].split(",")[0],
            "rank": work.options["rank"],
            "targets": work.options["targets"],
        }
        # Loading precedes the search, and the last step may take as long as all before it.
        return measure("benchmarks.context", options, min(work.limit_seconds, 2 * seconds + 60), work.cache)

    return run


def limited(work: Workload, seconds: float) -> Workload:
    """Return the same workload with a time limit for its next run."""
    return Workload({**work.options, "minutes": str(seconds / 60)}, work.model, work.shape, work.folder, work.cache)


def summarize(runs: Mapping[str, list[dict[str, Any]]], ceiling: Figures, work: Workload) -> dict[str, Any]:
    """Summarize by length: ours, stock, peers, their ratios, peaks with checkpointing, contexts and start-up."""
    lines: dict[str, Figures] = {}
    for name, done in runs.items():
        if name.startswith("context"):
            continue
        warmup = 1 if name.startswith(("stock", "peer")) else int(work.options["warmup"])
        figures = medians([run_figures(run, warmup, work.shape) for run in done])
        if "failed" not in figures:
            figures["ceiling_share"] = share_of_ceiling(figures, ceiling)
        lines[name] = figures
    at: dict[str, Any] = {}
    for length in work.options["lengths"].split(","):
        end = f" {length}"
        here = {name.removesuffix(end): figures for name, figures in lines.items() if name.endswith(end)}
        ours = here.get(f"ours {work.options['ours'].split(',')[0]}", {"failed": "not run"})
        stock = {name.removeprefix("stock "): figures for name, figures in here.items() if name.startswith("stock ")}
        at[length] = {"ours": ours, "stock": stock, **compare(ours, stock), "ceiling_share": ours.get("ceiling_share")}
    contexts = {}
    for name, done in runs.items():
        if name.startswith("context"):
            budget = name.removeprefix("context ")
            contexts[budget] = {**done[-1], "published_tokens": PUBLISHED_TOKENS.get(budget)}
    starts = [
        run["start_seconds"]
        for name, done in runs.items()
        if name.startswith("ours")
        for run in done
        if "failed" not in run
    ]
    first = next(iter(at.values()))
    return {
        "ours": first["ours"],
        "stock": first["stock"],
        **{key: first[key] for key in ("ratio", "peak_ratio", "ceiling_share")},
        "lengths": at,
        "table": lines,
        "contexts": contexts,
        "ceiling": ceiling,
        "start_seconds": {"first": starts[0], "later": min(starts[1:], default=None)} if starts else None,
    }


def measure_all(work: Workload, machine: Mapping[str, Any], deadline: float) -> dict[str, Any]:
    """Run the planned runs until `deadline` (time.monotonic), and write the results after each."""
    file = report.results_file("gpu", work.options, machine)
    runs: dict[str, list[dict[str, Any]]] = {}
    ceilings: list[dict[str, float]] = []
    summary: dict[str, Any] = {}
    tokens = int(work.options["lengths"].split(",")[-1])
    for index, (name, run) in enumerate(planned(work.options)):
        left = deadline - time.monotonic()
        if index % 3 == 0 and left > 60:
            ceilings.append(work.ceiling(tokens, float(work.options["ceiling_seconds"])))
        seconds = min(left, float(work.options["run_seconds"]))
        outcome = run(limited(work, seconds)) if left > 5 else {"failed": "no time left"}
        runs.setdefault(name, []).append(outcome)
        report.log(f"{max(0.0, deadline - time.monotonic()):>5.0f} s left  {name}: {_outcome(name, outcome)}")
        figures = summarize(runs, ceiling_of(ceilings), work)
        summary = {**report.heading("gpu", work.options, machine), **figures, "runs": runs}
        report.write(file, summary)
    return summary


def _outcome(name: str, outcome: Mapping[str, Any]) -> str:
    if "failed" in outcome:
        return outcome["failed"]
    if name.startswith("context"):
        return f"{outcome['tokens']:,} tokens trained, {outcome['predicted_tokens'] or 0:,} predicted"
    return f"{outcome['steps'][-1]['seconds']:.2f} s per step, peak {outcome['peak_bytes'] / 1e9:.2f} GB"


def main(words: list[str]) -> None:
    options = parse(words, OPTIONS, prefixes=("ours.",))
    deadline = time.monotonic() + 60 * float(options["minutes"])
    machine = device()
    if machine["kind"] == "cpu":
        report.log("device: cpu (no GPU found)")
    with prepared(options) as work:
        summary = measure_all(work, machine, deadline)
    report.log("\n" + report.table(summary["table"]))
    for length, figures in summary["lengths"].items():
        if figures["ratio"]:
            report.log(
                f"{length} tokens: {figures['ratio']:.2f} times stock at {figures['peak_ratio']:.2f} of its peak"
            )
    print(json.dumps({key: value for key, value in summary.items() if key != "runs"}))


if __name__ == "__main__":
    main(sys.argv[1:])
