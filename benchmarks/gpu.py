"""Measure everything on one GPU in ten minutes, without installing or downloading.

    python -m benchmarks.gpu [size=7B] [minutes=9.5] [parts=throughput,context,distill,preference,load,recompute,peers]
                             [adapters=all-linear:16,q_proj+v_proj:8] [lengths=8192,2048]

A step of every run has as many tokens as the longest pack. Each run is a process with a time limit. Failures are
recorded, and the other runs continue. The results file is written after every run, so an interrupted benchmark keeps
its results. Runs without time left are recorded as failed; `parts=` measures them in a second call.
Without a GPU it runs on the CPU, where `size=tiny` checks the harness within minutes.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.distill import VARIANTS, figures_of, prices
from benchmarks.figures import Figures, ceiling_of, compare, medians, run_figures, share_of_ceiling
from benchmarks.load import RUNS as LOADS
from benchmarks.load import summary_of as load_summary
from benchmarks.models import shape_of_size
from benchmarks.preference import SFT, pair_figures, prepare_pairs, run_ours
from benchmarks.processes import device, measure, parse
from benchmarks.stock import PEERS
from benchmarks.workload import DEFAULTS, Workload, prepared

OPTIONS = {
    **{key: value for key, value in DEFAULTS.items() if key not in ("rank", "targets")},
    "size": "7B",
    "minutes": "9.5",
    "parts": "throughput,context,distill,preference,load,recompute,peers",
    "adapters": "all-linear:16,q_proj+v_proj:8",
    "lengths": "8192,2048",
    # The first variant runs in every case, the others in the first case.
    "ours": "fast,whole",
    "stock": "packing,packing+checkpointing",
    "steps": "3",
    "warmup": "3",
    "repeats": "1",
    "recompute": "all,offload",
    # Tokens of a pair's prompt, and of each answer.
    "prompt": "512",
    "answer": "512",
    "budgets": "16,24,80",
    "context_seconds": "60",
    "context_most": "400000",
    "run_seconds": "120",
    "ceiling_seconds": "0.3",
}
# Unsloth's documentation: longest context of Llama-3.1-8B QLoRA, rank 32 on all linears, one row per batch.
PUBLISHED_TOKENS = {"16": 40_724, "24": 78_475, "80": 342_733}
# Tokens per row of TRL's GKDTrainer, which pads rows and has no packing.
_GKD_TOKENS = 512
# Runs between two measurements of the ceiling.
_CEILING_EVERY = 4
# Copies of the model's bytes for which a folder in memory must have room: the model, its 4-bit copy, the processes.
_ROOM = 4
Run = tuple[str, Callable[[Workload], dict[str, Any]]]


def planned(options: Mapping[str, str]) -> Iterator[Run]:
    """Return every run by name, the most important first. `repeats` alternates the throughput runs."""
    adapters, lengths, budgets = (options[key].split(",") for key in ("adapters", "lengths", "budgets"))
    names = [name for name in options["ours"].split(",") if name]
    stock = [name for name in options["stock"].split(",") if name not in ("", "none")]
    first = adapters[0], lengths[0]
    parts: dict[str, list[Run]] = {
        "throughput": [
            *(
                run
                for case in ((adapter, length) for length in lengths for adapter in adapters)
                for run in (_ours(names[0], *case), *(_stock(name, *case) for name in stock[:1]))
            ),
            *(_ours(name, *first) for name in names[1:]),
            *(_stock(name, *first) for name in stock[1:]),
        ]
        * int(options["repeats"]),
        "context": [_context(budgets[0])],
        "distill": [_distill(adapters[-1], lengths[0]), *(_gkd(adapters[-1]) for _ in stock[:1])],
        "preference": [
            *(_preference("ours", name, adapters[-1], lengths[0]) for name in (SFT, "base")),
            *(_preference("stock", "dpo", adapters[-1], lengths[0]) for _ in stock[:1]),
        ],
        "load": [_load(name) for name in LOADS],
        "recompute": [_ours(names[0], *first, policy) for policy in options["recompute"].split(",")],
        "peers": [_stock(name, *first, side="peer") for name in PEERS],
    }
    chosen = options["parts"].split(",")
    if unknown := [part for part in chosen if part not in parts]:
        raise SystemExit(f"parts={','.join(unknown)}: unknown; choose from {', '.join(parts)}")
    for part in chosen:
        yield from parts[part]
    if "context" in chosen:
        yield from map(_context, budgets[1:])


def step_batch(options: Mapping[str, str], length: int) -> int:
    """Return the packs of `length` tokens per step, so that all steps have the tokens of the longest pack."""
    return max(map(int, options["lengths"].split(","))) // length


def adapted(work: Workload, adapter: str) -> Workload:
    """Return the workload with an adapter named TARGETS:RANK, where + joins targets."""
    targets, _, rank = adapter.partition(":")
    return replace(work, options={**work.options, "targets": targets.replace("+", ","), "rank": rank})


def _ours(name: str, adapter: str, length: str, policy: str = "") -> Run:
    def run(work: Workload) -> dict[str, Any]:
        settings = f"train.gradient_checkpointing={policy}" if policy else ""
        return adapted(work, adapter).ours(name, int(length), step_batch(work.options, int(length)), settings)

    return f"ours {name}{policy and f'/{policy}'} {adapter} {length}", run


def _stock(name: str, adapter: str, length: str, side: str = "stock") -> Run:
    def run(work: Workload) -> dict[str, Any]:
        return adapted(work, adapter).stock(name, int(length), step_batch(work.options, int(length)))

    return f"{side} {name} {adapter} {length}", run


def _distill(adapter: str, length: str) -> Run:
    def run(work: Workload) -> dict[str, Any]:
        batch = step_batch(work.options, int(length))
        name = work.options["ours"].split(",")[0]
        return adapted(work, adapter).ours(name, int(length), batch, VARIANTS["resident"].settings)

    return "distill ours", run


def _gkd(adapter: str) -> Run:
    def run(work: Workload) -> dict[str, Any]:
        tokens = step_batch(work.options, 1)
        length = min(_GKD_TOKENS, tokens)
        return adapted(work, adapter).stock("gkd", length, tokens // length)

    return "distill gkd", run


def _preference(side: str, name: str, adapter: str, length: str) -> Run:
    """Return a run on pairs, or on their answers as rows (`sft`): as many as fill a step's tokens."""

    def run(work: Workload) -> dict[str, Any]:
        work = with_pairs(adapted(work, adapter), int(length))
        pairs = prepare_pairs(work)
        if side == "ours":
            return run_ours(work, pairs, name)
        return work.stock(name, pairs.length, pairs.count, rows=pairs.file)

    return f"preference {side} {name}", run


def with_pairs(work: Workload, length: int) -> Workload:
    """Return the workload with the options of benchmarks.preference, for steps of the tokens of all other runs."""
    options = work.options
    tokens = 2 * (int(options["prompt"]) + int(options["answer"]))
    pairs = max(1, step_batch(options, length) * length // tokens)
    changes = {"pairs": str(pairs), "objective": "dpo", "ours": options["ours"].split(",")[0]}
    return replace(work, options={**options, **changes})


def _load(name: str) -> Run:
    def run(work: Workload) -> dict[str, Any]:
        # A cache of its own: `first` fills it, `next` reads it.
        return measure("benchmarks.load", {"model": work.model, "run": name}, work.limit_seconds, work.folder / "load")

    return f"load {name}", run


def _context(budget: str) -> Run:
    def run(work: Workload) -> dict[str, Any]:
        options = {
            "model": work.model,
            "budget_gb": budget,
            "seconds": work.options["context_seconds"],
            "most": work.options["context_most"],
            # The adapter of the published figures.
            "rank": "32",
            "targets": "all-linear",
            "first": work.options["lengths"].split(",")[-1],
        }
        return measure("benchmarks.context", options, work.limit_seconds, work.cache)

    return f"context {budget}", run


def limited(work: Workload, name: str, left: float, first: bool = False) -> Workload:
    """Return the same workload with a time limit for its next run. first: it also compiles kernels and quantizes."""
    seconds = float(work.options["run_seconds"]) * (2 if first else 1)
    if name.startswith("context"):  # the last step may take as long as all before it
        seconds += 2 * float(work.options["context_seconds"])
    return replace(work, options={**work.options, "minutes": str(min(left, seconds) / 60)})


def summarize(runs: Mapping[str, list[dict[str, Any]]], ceiling: Figures, work: Workload) -> dict[str, Any]:
    """Summarize by adapter and length: ours, stock, their ratios; then contexts, distillation, loading, start-up."""
    lines: dict[str, Figures] = {}
    cases: dict[str, dict[str, dict[str, Figures]]] = {}
    for name, done in runs.items():
        side, variant, *case = name.split(" ")
        if side not in ("ours", "stock", "peer"):
            continue
        warmup = int(work.options["warmup"]) if side == "ours" else 1
        lines[name] = figures = medians([run_figures(run, warmup, work.shape) for run in done])
        if "failed" not in figures:
            figures["ceiling_share"] = share_of_ceiling(figures, ceiling)
        cases.setdefault(" ".join(case), {}).setdefault(side, {})[variant] = figures
    compared = {}
    for case, sides in cases.items():
        ours = sides.get("ours", {}).get(work.options["ours"].split(",")[0], {"failed": "not run"})
        stock = sides.get("stock", {})
        compared[case] = {"ours": ours, "stock": stock, **compare(ours, stock), "share": ours.get("ceiling_share")}
    first = next(iter(compared.values()), {"ours": {"failed": "not run"}, "stock": {}, **compare({"failed": ""}, {})})
    return {
        **{key: first[key] for key in ("ours", "stock", "ratio", "peak_ratio")},
        "ceiling_share": first["ours"].get("ceiling_share"),
        "cases": compared,
        "table": lines,
        "contexts": {
            name.removeprefix("context "): {**done[-1], "published_tokens": PUBLISHED_TOKENS.get(name.split(" ")[1])}
            for name, done in runs.items()
            if name.startswith("context")
        },
        "distill": _distillation(work, runs),
        "preference": _preferences(work, runs),
        "load": _loading(runs),
        "ceiling": ceiling,
        "start_seconds": {side: _starts(runs, side) for side in ("ours", "stock")},
    }


def _distillation(work: Workload, runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the figures of distillation with a resident teacher, ours and GKDTrainer's, their ratio, and our price.

    The price is over plain fine-tuning in the case of the same adapter and length.
    """
    done = {
        name.removeprefix("distill "): figures_of(work, "ours" if name == "distill ours" else "stock", found[-1])
        for name, found in runs.items()
        if name.startswith("distill")
    }
    stock = {name: figures for name, figures in done.items() if name != "ours"}
    ours, adapters, lengths = (work.options[key].split(",") for key in ("ours", "adapters", "lengths"))
    plain = runs.get(f"ours {ours[0]} {adapters[-1]} {lengths[0]}")
    if plain and "ours" in done:
        done["ours"] |= prices(done["ours"], figures_of(work, "ours", plain[-1]))
    return {**done, **compare(done.get("ours", {"failed": "not run"}), stock)}


def _preferences(work: Workload, runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the figures of learning from pairs, its price over plain fine-tuning on the same answers, and TRL's."""
    length = int(work.options["lengths"].split(",")[0])
    done = {
        name.removeprefix("preference "): pair_figures(with_pairs(work, length), name.split(" ")[1], found[-1])
        for name, found in runs.items()
        if name.startswith("preference")
    }
    ours, plain = (done.get(f"ours {name}", {"failed": "not run"}) for name in ("base", SFT))
    stock = {name: figures for name, figures in done.items() if name.startswith("stock")}
    return {**done, **prices(ours, plain), **compare(ours, stock)}


def _loading(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return seconds and peaks of loading the base; their ratios if all kinds are measured."""
    done = {name.removeprefix("load "): found for name, found in runs.items() if name.startswith("load")}
    if len(done) == len(LOADS) and not any("failed" in run for found in done.values() for run in found):
        return load_summary(done)
    return {"loads": {name: found[-1] for name, found in done.items()}}


def _starts(runs: Mapping[str, list[dict[str, Any]]], side: str) -> dict[str, float | None]:
    """Return the start-up seconds of a side's first run, which fills the caches, and the least of the later ones."""
    ran = [done[0] for name, done in runs.items() if name.startswith(side) and "failed" not in done[0]]
    found = [run["start_seconds"] for run in ran]
    return {"first": found[0] if found else None, "later": min(found[1:], default=None)}


def measure_all(work: Workload, machine: Mapping[str, Any], deadline: float) -> dict[str, Any]:
    """Run the planned runs until `deadline` (time.monotonic), and write the results after each."""
    parts = work.options["parts"]
    name = "gpu" if parts == OPTIONS["parts"] else f"gpu-{parts.replace(',', '-')}"
    file = report.results_file(name, work.options, machine)
    runs: dict[str, list[dict[str, Any]]] = {}
    ceilings: list[dict[str, float]] = []
    summary: dict[str, Any] = {}
    for index, (name, run) in enumerate(planned(work.options)):
        left = deadline - time.monotonic()
        if index % _CEILING_EVERY == 0 and left > 60:
            seconds = float(work.options["ceiling_seconds"])
            ceilings.append(limited(work, "ceiling", left).ceiling(step_batch(work.options, 1), seconds))
            left = deadline - time.monotonic()
        began = time.monotonic()
        outcome = run(limited(work, name, left, first=index == 0)) if left > 5 else {"failed": "no time left"}
        runs.setdefault(name, []).append({**outcome, "wall_seconds": time.monotonic() - began})
        report.log(f"{max(0.0, deadline - time.monotonic()):>5.0f} s left  {name}: {_outcome(name, outcome)}")
        figures = summarize(runs, ceiling_of(ceilings), work)
        summary = {**report.heading("gpu", work.options, machine), **figures, "runs": runs}
        report.write(file, summary)
    report.log(f"results: {file}")
    return summary


def _outcome(name: str, outcome: Mapping[str, Any]) -> str:
    if "failed" in outcome:
        return outcome["failed"]
    if name.startswith("context"):
        extrapolated = f", {outcome['predicted_tokens']:,} extrapolated" if outcome["extrapolated"] else ""
        return f"{outcome['tokens']:,} tokens trained{extrapolated}"
    if name.startswith("load"):
        return f"{outcome['seconds']:.1f} s"
    return f"{outcome['steps'][-1]['seconds']:.2f} s per step, peak {outcome['peak_bytes'] / 1e9:.2f} GB"


@contextmanager
def work_in_memory(options: dict[str, str]) -> Iterator[dict[str, str]]:
    """Yield the options with work= set to a temporary folder in memory, if none is given and it has room."""
    from finetune.planning.static_memory import parameters_of
    from finetune.system.machine import available_memory

    memory = Path("/dev/shm")
    room = min(available_memory() or 0, shutil.disk_usage(memory).free) if memory.is_dir() else 0
    shape = shape_of_size(options["size"], Path(options["tokenizer"]))
    if options["work"] or room < _ROOM * 2 * parameters_of(shape):
        yield options
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="finetune-benchmark-") as folder:
        yield {**options, "work": folder}


def main(words: list[str]) -> None:
    options = parse(words, OPTIONS, prefixes=("ours.",))
    deadline = time.monotonic() + 60 * float(options["minutes"])
    list(planned(options))  # an unknown part is an error now
    machine = device()
    if machine["kind"] == "cpu":
        report.log("device: cpu (no GPU found)")
    with work_in_memory(options) as options, prepared(options) as work:
        summary = measure_all(work, machine, deadline)
    report.log("\n" + report.table(summary["table"]))
    for case, figures in summary["cases"].items():
        if figures["ratio"]:
            report.log(f"{case}: {figures['ratio']:.2f} times stock at {figures['peak_ratio']:.2f} of its peak")
    print(json.dumps({key: value for key, value in summary.items() if key != "runs"}))


if __name__ == "__main__":
    main(sys.argv[1:])
