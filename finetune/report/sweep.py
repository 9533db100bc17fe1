"""Draw a sweep: the metric against each setting, as a picture and in sweep.html."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

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


def write_sweep_page(
    file: Path,
    title: str,
    headline: str,
    *,
    best: Sequence[tuple[str, str, str]],
    results: SweepResults | None,
    rows: Sequence[Sequence[str]],
    runs: Sequence[tuple[str, Run]],
) -> None:
    """Write sweep.html.

    Args:
        best: cards of the best run: label, value, detail.
        results: None if no run is measured.
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
        effects=[] if results is None else effect_pictures(results),
        labels=[label for label, _ in runs],
        styles=[swatch(i) for i in range(len(runs))],
        pictures=overlaid(runs),
    )
    write_text(file, page)


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
    places = _place_on_axis(axes, [values[key] for values, _ in results.runs])
    metrics = [metric for _, metric in results.runs]
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
