"""Draw a sweep: the metric against each setting, as a picture and in sweep.html."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.report.compare import swatch
from finetune.report.curves import Picture, overlaid
from finetune.report.environment import render_page
from finetune.report.run import Run
from finetune.system.atomic import write_text
from finetune.system.plotting import COLORS, figure, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PANELS = 6
_MOST_CURVES = 14  # more lines cannot be distinguished
_LEAST_GAP = 0.15  # between ticks, as a share of the axis


@dataclass(frozen=True)
class SweepResults:
    """The measured runs of a sweep.

    Attributes:
        metric: its label.
        minimize: whether a lower metric is better.
        runs: the setting's texts by key, and the metric, of each run; at least one.
    """

    metric: str
    minimize: bool
    runs: Sequence[tuple[Mapping[str, str], float]]

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for values, _ in self.runs for key in values))[:_MOST_PANELS]


@dataclass(frozen=True)
class Point:
    """A trial of a search with two objectives.

    Attributes:
        label: its number.
        stored_bytes: of the model as it is served.
        place: front (no full run is better in both), full (another one is), or paused (at an earlier step).
    """

    label: str
    stored_bytes: float
    metric: float
    place: Literal["front", "full", "paused"]


def write_sweep_page(
    file: Path,
    title: str,
    headline: str,
    *,
    best: Sequence[tuple[str, str, str]],
    results: SweepResults | None,
    points: Sequence[Point] = (),
    rows: Sequence[Sequence[str]],
    runs: Sequence[tuple[str, Run]],
) -> None:
    """Write sweep.html.

    Args:
        best: cards of the best run: label, value, detail.
        results: None if no run is measured.
        points: of a search with two objectives.
        rows: the table, its head first.
        runs: label and run, the best first.
    """
    runs = runs[:_MOST_CURVES]
    page = render_page(
        "sweep.html",
        title=title,
        headline=headline,
        best=best,
        rows=rows,
        front=[] if results is None or not points else [front_picture(points, results.metric)],
        effects=[] if results is None else effect_pictures(results),
        labels=[label for label, _ in runs],
        styles=[swatch(i) for i in range(len(runs))],
        pictures=overlaid(runs),
    )
    write_text(file, page)


def front_figure(points: Sequence[Point], metric: str) -> Figure:
    """Draw stored bytes against the metric: the Pareto front over the other trials, which are pale."""
    drawn, (axes,) = figure(6.4, 3.6)
    styles: dict[str, tuple[str, dict[str, Any]]] = {
        "paused": ("paused at an earlier step", {"marker": "x", "markersize": 4, "alpha": 0.35, "color": COLORS[6]}),
        "full": ("other full runs", {"marker": "o", "markersize": 4, "alpha": 0.35, "color": COLORS[0]}),
        "front": ("Pareto front", {"marker": "o", "markersize": 6, "color": COLORS[1]}),
    }
    unit, name = (1e9, "GB") if max(point.stored_bytes for point in points) >= 1e9 else (1e6, "MB")
    for place, (label, style) in styles.items():
        there = sorted(
            (point.stored_bytes / unit, point.metric, point.label) for point in points if point.place == place
        )
        if there:
            sizes, metrics, _ = zip(*there, strict=True)
            axes.plot(sizes, metrics, label=label, linestyle="none", **style)
            if place == "front":
                axes.step(sizes, metrics, where="post", linewidth=1.2, alpha=0.6, color=COLORS[1])
                for size, value, text in there:
                    axes.annotate(text, (size, value), xytext=(4, 5), textcoords="offset points", fontsize=8)
    values = [point.metric for point in points]
    if min(values) > 0 and max(values) >= 5 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel(f"stored model, {name}")
    axes.set_ylabel(metric)
    axes.legend(frameon=False, fontsize=8)
    return drawn


def front_picture(points: Sequence[Point], metric: str) -> Picture:
    """Draw the Pareto front for a page."""
    text = "The numbers are trials: no full run has both a better metric and fewer bytes."
    return Picture("Stored bytes", svg(front_figure(points, metric)), text)


def effects_figure(results: SweepResults) -> Figure:
    """Draw the metric against every setting, one panel each."""
    keys = results.keys
    drawn, panels = figure(max(4.0, 3.0 * len(keys)), 2.8, panels=len(keys))
    for axes, key in zip(panels, keys, strict=True):
        _draw_effect(axes, key, results)
        axes.set_xlabel(key)
    panels[0].set_ylabel(results.metric)
    return drawn


def effect_pictures(results: SweepResults) -> list[Picture]:
    """Draw the metric against every setting, one picture each."""
    pictures = []
    for key in results.keys:
        drawn, (axes,) = figure(4.4, 2.5)
        _draw_effect(axes, key, results)
        axes.set_ylabel(results.metric)
        pictures.append(Picture(key, svg(drawn), "Dots are runs; the line joins the best run of each value."))
    return pictures


def _draw_effect(axes: Axes, key: str, results: SweepResults) -> None:
    runs = [(values[key], metric) for values, metric in results.runs if key in values]  # Some have no such setting.
    places = _place_on_axis(axes, [value for value, _ in runs])
    metrics = [metric for _, metric in runs]
    by_place: dict[float, list[float]] = defaultdict(list)
    for place, metric in zip(places, metrics, strict=True):
        by_place[place].append(metric)
    pick = min if results.minimize else max
    if len(by_place) < len(places):
        bests = [(place, pick(values)) for place, values in sorted(by_place.items())]
        axes.plot(*zip(*bests, strict=True), linewidth=1.2, alpha=0.6, color=COLORS[0])
    axes.plot(places, metrics, "o", markersize=4, color=COLORS[0])
    best = pick(range(len(metrics)), key=metrics.__getitem__)
    axes.plot(places[best], metrics[best], "o", markersize=7, color=COLORS[1])


def _place_on_axis(axes: Axes, texts: Sequence[str]) -> Sequence[float]:
    """Return the place of each value: numbers by size, words in their order. Sparse values become the ticks."""
    from matplotlib.ticker import LogLocator

    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        order = list(dict.fromkeys(texts))
        axes.set_xticks(range(len(order)), [text if len(text) <= 16 else f"{text[:15]}…" for text in order])
        axes.margins(x=0.2)
        return [float(order.index(text)) for text in texts]
    few = sorted(set(numbers))
    logarithmic = few[0] > 0 and few[-1] >= 5 * few[0]
    if logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.xaxis.set_major_locator(LogLocator(subs=[1.0] if few[-1] > 20 * few[0] else [1.0, 2.0, 5.0]))
    else:
        axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:.4g}")
    places = [math.log(value) for value in few] if logarithmic else few
    gaps = [right - left for left, right in pairwise(places)]
    if len(few) == 1 or min(gaps) >= _LEAST_GAP * (places[-1] - places[0]):
        axes.set_xticks(few)
    return numbers
