"""Measure speed and memory over one setting: `python -m benchmarks.throughput curve=length|batch|rank|targets`.

length   packs of 512 to 16k tokens: of normal rows (constant cost per token), and of one long row each (quadratic
         attention)
batch    packs of `pack` tokens, 1 to 8 per forward pass
rank     adapters of rank 4 to 128
targets  linear layers with an adapter
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import plots, report
from benchmarks.figures import Figures, ceiling_of, run_figures, share_of_ceiling
from benchmarks.workload import Workload

Series = dict[str, dict[str, Figures]]  # line -> point -> figures
_TARGETS = ("q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj", "all-linear")


@dataclass(frozen=True)
class Curve:
    """points: default x values. runs: (line, side, function that runs it) of a point."""

    points: tuple[str, ...]
    label: str
    runs: Callable[[Workload, str], Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]]


def _pack(work: Workload) -> int:
    return int(work.options["pack"])


def _by_length(work: Workload, point: str) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    length = int(point)
    for name in work.ours_variants():
        yield f"ours {name}, rows in packs", "ours", lambda name=name: work.ours(name, length, 1)
        yield (
            f"ours {name}, one long row",
            "ours",
            lambda name=name: work.ours(name, length, 1, rows=work.long_rows(length), train_on="assistant"),
        )
    for name in work.stock_variants():
        yield f"stock {name}", "stock", lambda name=name: work.stock(name, length, 1)


def _by_batch(work: Workload, point: str) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    for name in work.ours_variants():
        yield f"ours {name}", "ours", lambda name=name: work.ours(name, _pack(work), int(point))
    for name in work.stock_variants():
        yield f"stock {name}", "stock", lambda name=name: work.stock(name, _pack(work), int(point))


def _by_adapter(key: str) -> Callable[[Workload, str], Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]]:
    def runs(work: Workload, point: str) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
        for name in work.ours_variants():
            yield f"ours {name}", "ours", lambda name=name: work.ours(name, _pack(work), 1, **{key: point})
        for name in work.stock_variants():
            yield f"stock {name}", "stock", lambda name=name: work.stock(name, _pack(work), 1, **{key: point})

    return runs


CURVES = {
    "length": Curve(("512", "1024", "2048", "4096", "8192", "16384"), "tokens in a pack", _by_length),
    "batch": Curve(("1", "2", "4", "8"), "packs in a forward pass", _by_batch),
    "rank": Curve(("4", "8", "16", "32", "64", "128"), "LoRA rank", _by_adapter("rank")),
    "targets": Curve(_TARGETS, "adapted linears", _by_adapter("targets")),
}


def measure_curve(work: Workload, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Measure every point in a fresh process, and write the PNG and both results. Stock runs only if named.

    Raises: MissingExtra before the first measurement, if no PNG can be drawn.
    """
    name = work.options["curve"]
    if name not in CURVES:
        raise SystemExit(f"curve={name}: unknown; choose from {', '.join(CURVES)}")
    if work.options["stock"] == "all":
        work = Workload({**work.options, "stock": "none"}, work.model, work.shape, work.folder, work.cache)
    curve = CURVES[name]
    given = work.options["points"]
    points = tuple(given.split(";" if name == "targets" else ",")) if given else curve.points
    series: Series = {}
    ceilings = []
    for point in points:
        ceilings.append(work.ceiling(_pack(work), float(work.options["ceiling_seconds"])))
        for line, side, run in curve.runs(work, point):
            warmup = int(work.options["warmup"]) if side == "ours" else 1
            figures = run_figures(run(), warmup, work.shape)
            series.setdefault(line, {})[point] = figures
            report.log(report.table({f"{line}, {point}": figures}))
    ceiling = ceiling_of(ceilings)
    for figures in (figures for line in series.values() for figures in line.values()):
        if "failed" not in figures:
            figures["ceiling_share"] = share_of_ceiling(figures, ceiling)
    title = f"throughput-{name}"
    picture = report.results_file(title, work.options, machine, "png")
    heading = f"Qwen2.5-{work.options['size']} QLoRA on {machine['name']}, {machine['cores']} cores"
    plots.draw(picture, heading, curve.label, points, series, ceiling["flops_per_second"])
    summary = {
        **report.heading(title, work.options, machine),
        "points": points,
        "series": series,
        "ceiling": ceiling,
        "growth": {line: growth(done) for line, done in series.items()},
        "picture": picture.name,
    }
    report.write(report.results_file(title, work.options, machine), summary)
    return summary


def growth(line: Mapping[str, Figures]) -> dict[str, float | None]:
    """Compare a line's last point with that at 2,048 tokens, or else its first.

    cost_ratio: seconds per token, last over base. bytes_per_token: extra peak over extra tokens of a step, for each
    neighboring pair.
    """
    done = {point: figures for point, figures in line.items() if "failed" not in figures}
    if len(done) < 2:
        return {"cost_ratio": None, "bytes_per_token": None}
    base, last = done.get("2048", next(iter(done.values()))), list(done.values())[-1]
    figures = list(done.values())
    return {
        "cost_ratio": last["seconds_per_token"] / base["seconds_per_token"],
        "bytes_per_token": [
            (after["train_peak_bytes"] - before["train_peak_bytes"])
            / (after["tokens_per_step"] - before["tokens_per_step"])
            for before, after in itertools.pairwise(figures)
            if after.get("train_peak_bytes") and after["tokens_per_step"] > 1.2 * before["tokens_per_step"]
        ],
    }
