"""What came of a sweep: a table, the best run first, what each setting did, and every run's curves."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.report.compare import swatch, text_table
from finetune.report.curves import Picture, overlaid
from finetune.report.environment import page_environment
from finetune.report.facts import FIGURES, figure_named
from finetune.report.run import Run, read_run
from finetune.sweep.record import Record, Trial
from finetune.system.atomic import write_text
from finetune.system.errors import InputError
from finetune.system.plotting import COLORS, figure, save_png, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TABLE, PICTURE, PAGE = "sweep.md", "sweep.png", "sweep.html"
_MOST_PANELS = 6
_MOST_CURVES = 14  # so many lines can be told apart
_LEAST_GAP = 0.15  # between ticks, as a share of the axis
_BESIDE = ("eval_loss", "exact_match_after", "final_loss", "train_seconds", "peak_bytes")


def table(folder: Path, record: Record) -> list[list[str]]:
    """The head, then a line for each run, the best first: its values, the metric, other figures, how it ended."""
    keys = list(dict.fromkeys(key for trial in record.trials for key in trial.values))
    judged = figure_named(record.metric)
    runs = {trial.number: _run_of(folder, trial) for trial in record.trials}
    beside = [
        figure
        for figure in FIGURES
        if figure.name in _BESIDE
        and figure.name != record.metric
        and any(run is not None and run.figure(figure.name) is not None for run in runs.values())
    ]
    rows = [["run", *keys, judged.label, *(figure.label for figure in beside), "status"]]
    for trial in record.ranked():
        run = runs[trial.number]
        values = [None if run is None else run.figure(figure.name) for figure in beside]
        cells = ["" if value is None else figure.form(value) for figure, value in zip(beside, values, strict=True)]
        metric = "" if trial.metric is None else judged.form(trial.metric)
        name = f"trial-{trial.number:03d}"
        rows.append([name, *(trial.values.get(key, "") for key in keys), metric, *cells, _ending(trial)])
    return rows


def _ending(trial: Trial) -> str:
    if trial.same_as is not None:
        return f"as {trial.folder_name}"
    return f"{trial.status}: {trial.error.splitlines()[0]}" if trial.error else trial.status


def _run_of(folder: Path, trial: Trial) -> Run | None:
    try:
        return read_run(folder / trial.folder_name)
    except InputError:
        return None  # it has not begun


def write_table(folder: Path, record: Record) -> None:
    """sweep.md, written whole."""
    write_text(folder / TABLE, text_table(table(folder, record)) + "\n")


def write_outcome(folder: Path, name: str, record: Record) -> None:
    """sweep.md, sweep.png and sweep.html, each written whole."""
    write_table(folder, record)
    ranked = record.ranked()
    judged = [trial for trial in ranked if trial.metric is not None]
    if judged:
        save_png(effects(record), folder / PICTURE)
    labeled = [
        (f"trial-{trial.number:03d}: {trial.described}", run)
        for trial in ranked
        if trial.same_as is None and (run := _run_of(folder, trial)) is not None and run.metrics
    ][:_MOST_CURVES]
    page = (
        page_environment()
        .get_template("sweep.html")
        .render(
            title=f"{name}: sweep",
            record=record,
            rows=table(folder, record),
            best=judged[0] if judged else None,
            metric=figure_named(record.metric),
            effects=effect_pictures(record) if judged else [],
            labels=[label for label, _ in labeled],
            styles=[swatch(i) for i in range(len(labeled))],
            pictures=overlaid(labeled),
        )
    )
    write_text(folder / PAGE, page)


def effects(record: Record) -> Figure:
    """The metric against every setting, a panel each."""
    keys = _keys(record)
    drawn, panels = figure(max(4.0, 3.0 * len(keys)), 2.8, panels=len(keys))
    for axes, key in zip(panels, keys, strict=True):
        _draw_effect(axes, key, record)
        axes.set_xlabel(key)
    panels[0].set_ylabel(figure_named(record.metric).label)
    return drawn


def effect_pictures(record: Record) -> list[Picture]:
    """The same, a picture each."""
    pictures = []
    for key in _keys(record):
        drawn, (axes,) = figure(4.4, 2.5)
        _draw_effect(axes, key, record)
        axes.set_ylabel(figure_named(record.metric).label)
        pictures.append(Picture(key, svg(drawn), "A dot is a run; the line goes through the best of each value."))
    return pictures


def _keys(record: Record) -> list[str]:
    return list(dict.fromkeys(key for trial in record.trials for key in trial.values))[:_MOST_PANELS]


def _draw_effect(axes: Axes, key: str, record: Record) -> None:
    judged = [trial for trial in record.trials if trial.metric is not None and trial.same_as is None]
    texts = [trial.values[key] for trial in judged]
    places = _place_on_axis(axes, texts)
    metrics = [trial.metric or 0.0 for trial in judged]
    by_place: dict[float, list[float]] = defaultdict(list)
    for place, metric in zip(places, metrics, strict=True):
        by_place[place].append(metric)
    pick = min if record.minimize else max
    if len(by_place) < len(places):
        bests = [(place, pick(values)) for place, values in sorted(by_place.items())]
        axes.plot(*zip(*bests, strict=True), linewidth=1.2, alpha=0.6, color=COLORS[0])
    axes.plot(places, metrics, "o", markersize=4, color=COLORS[0])
    best = pick(range(len(metrics)), key=metrics.__getitem__)
    axes.plot(places[best], metrics[best], "o", markersize=7, color=COLORS[1])


def _place_on_axis(axes: Axes, texts: Sequence[str]) -> Sequence[float]:
    """Where each value lies on the axis: numbers by size, words in their order.

    Values that leave each other room are the ticks.
    """
    from matplotlib.ticker import LogLocator

    numbers = _numbers(texts)
    if numbers is None:
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


def _numbers(texts: Sequence[str]) -> list[float] | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None
