"""Measure peak memory over the tokens of a forward pass: the static part, and bytes per token.

    python -m benchmarks.memory [size=0.5B] [points=512,1024,2048,4096] [recompute=none,auto,all]
                                [stock=all] [steps=1]

Every point is a fresh process that trains one pack of that many tokens per step. A line through the peaks of training
(without loading) gives both.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks import plots, report
from benchmarks.figures import Figures, run_figures
from benchmarks.processes import device, parse
from benchmarks.workload import DEFAULTS, Workload, prepared

OPTIONS = {**DEFAULTS, "steps": "1", "warmup": "1", "points": "512,1024,2048,4096", "recompute": "none,auto,all"}
_COLUMNS = (
    ("peak GB", "peak_bytes", 1e-9, ".2f"),
    ("loading GB", "load_peak_bytes", 1e-9, ".2f"),
    ("training GB", "train_peak_bytes", 1e-9, ".2f"),
    ("tokens/s", "tokens_per_second", 1.0, ",.1f"),
)
_FIT_COLUMNS = (
    ("static GB", "static_bytes", 1e-9, ".2f"),
    ("kB a token", "bytes_per_token", 1e-3, ",.1f"),
    ("curvature", "curvature", 1.0, ".2f"),
)
Run = tuple[str, str, Callable[[], dict[str, Any]]]


def fit(peaks: Mapping[float, float]) -> dict[str, float | None]:
    """Fit a line of least squares to peak bytes over tokens.

    Returns: static_bytes (at 0 tokens), bytes_per_token, and curvature: bytes per token between the two longest points
    over those between the two shortest; 1 is a straight line. None with too few points.
    """
    if len(peaks) < 2:
        return {"static_bytes": None, "bytes_per_token": None, "curvature": None}
    points = sorted(peaks.items())
    x_mean = sum(x for x, _ in points) / len(points)
    y_mean = sum(y for _, y in points) / len(points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.pairwise(points)]
    curvature = slopes[-1] / slopes[0] if len(slopes) > 1 and slopes[0] > 0 else None
    return {"static_bytes": y_mean - slope * x_mean, "bytes_per_token": slope, "curvature": curvature}


def runs_at(work: Workload, tokens: int) -> Iterator[Run]:
    """Return (line, side, function that runs it) of every line at one number of tokens."""
    for policy in filter(None, work.options["recompute"].split(",")):
        for name in work.ours_variants():
            settings = f"{work.variant(name)};train.gradient_checkpointing={policy}"
            yield f"ours {name}, recompute={policy}", "ours", lambda s=settings, n=name: work.ours(n, tokens, 1, set=s)
    for name in work.stock_variants():
        yield f"stock {name}", "stock", lambda name=name: work.stock(name, tokens, 1)


def summarize(series: Mapping[str, Mapping[str, Figures]]) -> dict[str, Any]:
    """Return each line's fit, and peak_ratio: our lowest over the lowest stock peak at the longest common point.

    `ours` and `stock` hold each line's fit and its peak by point.
    """
    lines: dict[str, dict[str, Any]] = {}
    for name, line in series.items():
        done = {point: figures for point, figures in line.items() if "failed" not in figures}
        peaks = {
            figures["tokens_per_step"]: figures["train_peak_bytes"] or figures["peak_bytes"]
            for figures in done.values()
        }
        lines[name] = {**fit(peaks), "peak_bytes": {point: figures["peak_bytes"] for point, figures in done.items()}}
    sides = {side: {n: line for n, line in lines.items() if n.startswith(side)} for side in ("ours", "stock")}

    def lowest(side: str, point: str) -> int | None:
        peaks = [line["peak_bytes"][point] for line in sides[side].values() if point in line["peak_bytes"]]
        return min(peaks, default=None)

    points = {point for line in lines.values() for point in line["peak_bytes"]}
    both = [point for point in points if lowest("ours", point) and lowest("stock", point)]
    longest = max(both, key=int, default=None)
    ratio = None if longest is None else lowest("ours", longest) / lowest("stock", longest)
    return {**sides, "peak_ratio": ratio, "peak_ratio_at": longest}


def main(words: list[str]) -> None:
    options = parse(words, OPTIONS, prefixes=("ours.",))
    machine = device()
    series: dict[str, dict[str, Figures]] = {}
    points = options["points"].split(",")
    with prepared(options) as work:
        for point in points:
            for line, side, run in runs_at(work, int(point)):
                figures = run_figures(run(), int(options["warmup"]) if side == "ours" else 1, work.shape)
                series.setdefault(line, {})[point] = figures
                report.say(report.table({f"{line}, {point}": figures}, _COLUMNS))
        summary = {**report.heading("memory", work.options, machine), **summarize(series), "series": series}
    report.say("\n" + report.table({**summary["ours"], **summary["stock"]}, _FIT_COLUMNS))
    picture = report.results_file("memory", options, machine, "png")
    title = f"Qwen2.5-{options['size']} QLoRA on {machine['name']}, {machine['cores']} cores"
    plots.draw(picture, title, "tokens in a forward pass", points, series)
    report.write(report.results_file("memory", options, machine), {**summary, "picture": picture.name})
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
