"""Compare measured allocations of 4, 8 and 16 bits per layer with simple ones of the same size, on the embedded base.

    python -m benchmarks.allocation [rows=256] [held_out=240] [budgets=16] [picture=docs/mixed-precision.png]

Single layers are measured on training rows, as in `finetune sensitivity`. For each budget, `finetune allocate` solves
the knapsack, and compares it on the same rows with the simple allocations that fit: all layers alike, and every number
of first and last layers in more bits. All are then measured with the kernels of a run, on held-out rows that no choice
depends on. Budgets are evenly spaced between all NF4 and all bf16, plus the exact sizes of the simple allocations.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.processes import device, parse
from benchmarks.recovery import write_text

DEFAULTS = {
    "rows": "256",
    "held_out": "240",
    "budgets": "16",
    "picture": "docs/mixed-precision.png",
    "results": "benchmarks/results",
}
_COLUMNS = (
    ("MB", "bytes", 1e-6, ".3f"),
    ("by layers", "predicted", 1.0, ".2e"),
    ("own rows", "own_kl", 1.0, ".2e"),
    ("knapsack", "knapsack_kl", 1.0, ".2e"),
    ("chosen", "kl", 1.0, ".2e"),
    ("simple", "simple_kl", 1.0, ".2e"),
    ("of simple", "share", 1.0, ".0%"),
)


class Bench:
    """The embedded base with its sensitivities; whole allocations are measured at their first use."""

    def __init__(self, rows: int, held_out: int, folder: Path):
        from finetune import load_config
        from finetune.mixed_precision.choose import Choices, rest_bytes
        from finetune.mixed_precision.journal import Sensitivities
        from finetune.mixed_precision.layerwise import LayerwiseModel
        from finetune.mixed_precision.measure import Sensitivity, batches_of, load_rows, sample, working_device

        write_text(folder, rows, held_out)
        self.cfg = cfg = load_config(
            "quickstart.yaml",
            [
                f"data.train=[{{path: {folder}/train.jsonl}}]",
                f"data.eval=[{{path: {folder}/heldout.jsonl}}]",
                "data.max_length=512",
            ],
        )
        own, others = load_rows(cfg, report.log)
        self.batches = {"own_kl": batches_of(sample(own, rows), 512), "kl": batches_of(sample(others, held_out), 512)}
        model = LayerwiseModel(cfg.model, cfg.quant, working_device())
        measured = {}
        for found in Sensitivity(model, self.batches["own_kl"]).measure(["nf4", "int8"]):
            measured[found.name, found.kind] = found.mean
        self.single = Sensitivities(cfg.model.name, ["nf4", "int8"], rows, model.linears, measured, {})
        self.choices = Choices.of(self.single, rest_bytes(cfg.model, model.linears), cfg.quant.double, cfg.model.dtype)
        self._known: dict[tuple[str, ...], dict[str, Any]] = {}

    def figures(self, storage: Mapping[str, str]) -> dict[str, Any]:
        """Return the bytes of an allocation, its sum of single KLs, and its KL on both sets of rows."""
        from finetune.mixed_precision.choose import measure_quants, quant_of

        key = tuple(storage.values())
        if key not in self._known:
            found = {
                name: measure_quants(self.cfg.model, {"": quant_of(storage, self.cfg.quant)}, batches)[""]
                for name, batches in self.batches.items()
            }
            self._known[key] = {
                "bytes": self.choices.bytes_of(storage),
                "predicted": self.choices.nats_of(storage),
                "own_kl": found["own_kl"].kl,
                "kl": found["kl"].kl,
                "kl_error": found["kl"].error,
                "layers": {kind: list(storage.values()).count(kind) for kind in self.choices.kinds},
            }
        return self._known[key]

    def simple(self) -> dict[str, dict[str, str]]:
        """Return the simple allocations: all layers alike, and every number of outer layers in more bits."""
        choices = self.choices
        found = {f"all {_bits(kind)}": choices.uniform(kind) for kind in choices.kinds}
        for outer, inner in (("int8", "nf4"), ("none", "nf4"), ("none", "int8")):
            for first in range(choices.layers):
                for last in {first - 1, first, first + 1} & set(range(choices.layers - first)):
                    if first or last:
                        name = f"first {first}, last {last} in {_bits(outer)}, others {_bits(inner)}"
                        found[name] = choices.outer(outer, inner, first, last)
        return found


def _bits(kind: str) -> str:
    return "bf16" if kind == "none" else kind


def measure(options: Mapping[str, str]) -> dict[str, Any]:
    """Measure every figure of the benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(int(options["rows"]), int(options["held_out"]), Path(folder))
        simple = {name: bench.figures(storage) for name, storage in bench.simple().items()}
        smallest, largest = simple["all nf4"]["bytes"], simple["all bf16"]["bytes"]
        count = int(options["budgets"])
        even = {smallest + (largest - smallest) * i // (count - 1) for i in range(count - 1)}
        budgets = sorted(even | {figures["bytes"] for figures in simple.values() if figures["bytes"] < largest})
        lines = {str(budget): _line(bench, simple, budget) for budget in budgets}
        targets = {name: sum(int((b.labels >= 0).sum()) for b in some) for name, some in bench.batches.items()}
    return {"budgets": lines, "simple": simple, "targets": targets}


def _line(bench: Bench, simple: Mapping[str, dict[str, Any]], budget: int) -> dict[str, Any]:
    """Return the allocation within a budget of bytes, and the best simple one on the held-out rows."""
    from finetune.mixed_precision.choose import allocate

    fitting = {name: figures for name, figures in simple.items() if figures["bytes"] <= budget}
    knapsack = bench.figures(allocate(bench.choices, budget))
    options = {"knapsack": knapsack, **fitting}
    choice = min(options, key=lambda name: options[name]["own_kl"])
    best = min(fitting, key=lambda name: fitting[name]["kl"])
    chosen, simple_kl = options[choice], fitting[best]["kl"]
    return {
        **chosen,
        "budget": budget,
        "choice": choice,
        "knapsack_kl": knapsack["kl"],
        "simple": best,
        "simple_kl": simple_kl,
        "share": chosen["kl"] / simple_kl,
        "held": chosen["kl"] <= simple_kl,
    }


def draw(file: Path, figures: Mapping[str, Any]) -> None:
    """Plot KL against bytes of the measured and the simple allocations."""
    from finetune.system.plotting import figure, save_png

    drawn, (axes,) = figure(7.2, 4.2)
    lines = [line for line in figures["budgets"].values() if line["kl"] > 0]
    axes.step(
        [line["budget"] / 1e6 for line in lines],
        [line["kl"] for line in lines],
        where="post",
        linewidth=1.6,
        marker="o",
        markersize=3,
        label="chosen by measurement, within each budget",
    )
    groups = {
        "all layers alike": [n for n in figures["simple"] if n.startswith("all")],
        "outer layers int8, others nf4": [n for n in figures["simple"] if n.endswith("int8, others nf4")],
        "outer layers bf16, others nf4": [n for n in figures["simple"] if n.endswith("bf16, others nf4")],
        "outer layers bf16, others int8": [n for n in figures["simple"] if n.endswith("bf16, others int8")],
    }
    for (label, names), marker in zip(groups.items(), "s^vD", strict=True):
        points = [figures["simple"][name] for name in names if figures["simple"][name]["kl"] > 0]
        axes.plot([p["bytes"] / 1e6 for p in points], [p["kl"] for p in points], marker, markersize=5, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("weights of the base, MB")
    axes.set_ylabel("KL to the bf16 model, nats a target (held out)")
    axes.legend()
    save_png(drawn, file)


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    machine = device()
    figures = measure(options)
    report.log(report.table(figures["budgets"], _COLUMNS))
    missed = [name for name, line in figures["budgets"].items() if not line["held"]]
    report.log(f"simple allocation better: {len(missed)}/{len(figures['budgets'])} budgets {', '.join(missed)}")
    mended = [line["choice"] for line in figures["budgets"].values() if line["choice"] != "knapsack"]
    report.log(f"knapsack replaced: {len(mended)} budgets: {', '.join(mended)}")
    if options["picture"]:
        draw(Path(options["picture"]), figures)
    summary = {**report.heading("allocation", options, machine), **figures}
    report.write(report.results_file("allocation", options, machine), summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
