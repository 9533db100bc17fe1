"""Compare training speed and peak memory with stock TRL + PEFT + bitsandbytes, alternating in fresh processes.

    python -m benchmarks.throughput [size=0.5B] [rows=FILE] [tokenizer=FOLDER] [repeats=3] [steps=4] [length=512]
                                    [batch=4] [pack=2048] [ours=fast,plain] [ours.NAME=key=value;…]
                                    [stock=all] [peers=auto]
    python -m benchmarks.throughput curve=length|batch|rank|targets [points=512,2048,…] [stock=packing]

Stock trains `batch` rows (or packs) of up to `length` tokens per step. Ours trains the same number of tokens as packed
stock, in packs of `pack` tokens, one per forward pass. The first steps do not count. The ceiling is measured between
the runs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks import curves, report
from benchmarks.figures import Figures, ceiling_of, compare, medians, run_figures, share_of_ceiling
from benchmarks.processes import device, parse
from benchmarks.stock import PEERS
from benchmarks.workload import DEFAULTS, Workload, prepared

OPTIONS = {
    **DEFAULTS,
    "repeats": "3",
    "length": "512",
    "batch": "4",
    "pack": "2048",
    "peers": "auto",
    "curve": "",
    "points": "",
    "ceiling_seconds": "0.4",
}


def alternate(work: Workload) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, float]]]:
    """Return all runs by name (`ours NAME`, `stock NAME`), and the ceilings measured before each."""
    options = work.options
    length, batch = int(options["length"]), int(options["batch"])
    pack = min(int(options["pack"]), length * batch)
    peers = [*PEERS] if options["peers"] == "auto" else [name for name in options["peers"].split(",") if name in PEERS]
    turns = [("ours", name) for name in work.ours_variants()]
    turns += [("stock", name) for name in dict.fromkeys([*work.stock_variants(), *peers])]
    runs: dict[str, list[dict[str, Any]]] = {f"{side} {name}": [] for side, name in turns}
    ceilings = []
    for _ in range(int(options["repeats"])):
        for side, name in turns:
            ceilings.append(work.ceiling(pack, float(options["ceiling_seconds"])))
            run = (
                work.ours(name, pack, length * batch // pack, micro=1)
                if side == "ours"
                else work.stock(name, length, batch)
            )
            runs[f"{side} {name}"].append(run)
            figures = run_figures(run, warmup_of(side, options), work.shape)
            report.log(report.table({f"{side} {name}": figures}))
    ceilings.append(work.ceiling(pack, float(options["ceiling_seconds"])))
    return runs, ceilings


def warmup_of(side: str, options: Any) -> int:
    """Return the number of first steps to skip: ours may compile in them, stock has one warm-up step."""
    return int(options["warmup"]) if side == "ours" else 1


def summarize(
    work: Workload, runs: dict[str, list[dict[str, Any]]], ceilings: list[dict[str, float]]
) -> dict[str, Any]:
    """Return the figures of table and JSON; `ours` is our first variant, the others are in `variants`."""
    ceiling = ceiling_of(ceilings)
    lines: dict[str, Figures] = {}
    for name, done in runs.items():
        side = name.partition(" ")[0]
        figures = medians([run_figures(run, warmup_of(side, work.options), work.shape) for run in done])
        if "failed" not in figures:
            figures["ceiling_share"] = share_of_ceiling(figures, ceiling)
        lines[name] = figures
    ours = {name.removeprefix("ours "): figures for name, figures in lines.items() if name.startswith("ours ")}
    stock = {name.removeprefix("stock "): figures for name, figures in lines.items() if name.startswith("stock ")}
    first = next(iter(ours.values()), {"failed": "not run"})
    return {
        "ours": first,
        "variants": ours,
        "stock": {name: s for name, s in stock.items() if name not in PEERS},
        "peers": {name: s for name, s in stock.items() if name in PEERS},
        **compare(first, {name: s for name, s in stock.items() if name not in PEERS}),
        "ceiling_share": first.get("ceiling_share"),
        "ceiling": ceiling,
        "runs": runs,
    }


def describe(summary: dict[str, Any]) -> str:
    lines = {f"ours {name}": figures for name, figures in summary["variants"].items()}
    lines |= {f"stock {name}": figures for name, figures in summary["stock"].items()} | summary["peers"]
    ceiling = summary["ceiling"]
    text = [report.table(lines)]
    if ceiling["flops_per_second"]:
        text.append(
            f"ceiling: {ceiling['flops_per_second'] / 1e12:.3f} TFLOP/s in {summary['device']['multiplies_in']} "
            f"({ceiling['product']}, median of {ceiling['measurements']} measurements between the runs)"
        )
    if summary["ratio"]:
        text.append(
            f"ours is {summary['ratio']:.2f} times the best stock variant at {summary['peak_ratio']:.2f} of the lowest "
            "stock peak (medians)"
        )
    return "\n".join(text)


def main(words: list[str]) -> None:
    options = parse(words, OPTIONS, prefixes=("ours.",))
    machine = device()
    with prepared(options) as work:
        if options["curve"]:
            summary = curves.measure_curve(work, machine)
            print(json.dumps(summary))
            return
        runs, ceilings = alternate(work)
        summary = {**report.heading("throughput", work.options, machine), **summarize(work, runs, ceilings)}
    report.log("\n" + describe(summary))
    report.write(report.results_file("throughput", options, machine), summary)
    print(json.dumps({key: value for key, value in summary.items() if key != "runs"}))


if __name__ == "__main__":
    main(sys.argv[1:])
