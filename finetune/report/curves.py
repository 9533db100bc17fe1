"""A run's metrics as pictures: one figure a quantity, for one run or for several over one another."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from finetune.report.run import Run
from finetune.report.series import Series, smoothed, spread, thinned
from finetune.system.plotting import COLORS, figure, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_INCHES, _HEIGHT_INCHES = 4.4, 2.5  # Letters of 9 points can be read where a phone shows it in its whole width.
_NOISY = 40  # from so many points on, a mean is drawn over them
_LOGARITHMIC = 100.0
STYLES = tuple((color, dashes) for dashes, color in product(("-", "--", ":"), COLORS))


@dataclass(frozen=True)
class Quantity:
    """One figure. names: of the metrics that belong on it, or a pattern. factor: to the unit that its title names.

    noisy: has a value for every step, which a mean goes through. wide: may span powers of ten. share: none is above 1.
    """

    title: str
    names: str
    factor: float = 1.0
    noisy: bool = False
    wide: bool = False
    share: bool = False


_BY_SET = Quantity("Held-out rows, nats a target token", r"eval/.*/loss", wide=True)
QUANTITIES = (
    Quantity("Loss, nats a target token", r"loss|eval_loss", noisy=True, wide=True),
    _BY_SET,
    Quantity("Distance from the teacher, nats a target token", r"eval/.*/teacher_kl", wide=True),
    Quantity("Held-out token accuracy", r"eval/.*/accuracy", share=True),
    Quantity("Learning rate", r"learning_rate"),
    Quantity("Gradient norm before clipping", r"grad_norm", noisy=True, wide=True),
    Quantity("Speed, tokens a second", r"tokens_per_second", noisy=True),
    Quantity("Peak memory, GiB", r"peak_bytes", 2**-30),
)


@dataclass(frozen=True)
class Picture:
    """svg: an element of the page. note: what a reader should know of it, empty for nothing."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One curve of a figure. dots: a value now and then, whose places matter."""

    name: str
    series: Series
    color: str
    dashes: str = "-"
    noisy: bool = False
    dots: bool = False


def run_pictures(run: Run) -> list[Picture]:
    """Every quantity that the run measured."""
    pictures = []
    for quantity in QUANTITIES:
        found = {name: run.metrics[name] for name in _names(run, quantity)}
        if not found or (quantity is _BY_SET and _one_set(found, run)):
            continue
        lines = [
            Line(
                _label(name),
                series.scaled(quantity.factor),
                COLORS[i % len(COLORS)],
                noisy=quantity.noisy and not name.startswith("eval"),
                dots=name.startswith("eval"),
            )
            for i, (name, series) in enumerate(found.items())
        ]
        pictures.append(draw(quantity.title, lines, quantity, _last_step([run])))
    return pictures


def overlaid(runs: Sequence[tuple[str, Run]]) -> list[Picture]:
    """The same quantities of several runs; the n-th run has STYLES[n]. runs: label and run."""
    names = dict.fromkeys(name for _, run in runs for name in run.metrics)
    wanted = [
        (f"{quantity.title}{_of_set(name)}", name, quantity)
        for quantity in QUANTITIES
        for name in names
        if re.fullmatch(quantity.names, name)
        and not (quantity is _BY_SET and all(_one_set(_names(run, quantity), run) for _, run in runs))
    ]
    pictures = []
    for title, name, quantity in wanted:
        lines = [
            Line(
                label,
                run.metrics[name].scaled(quantity.factor),
                *STYLES[i % len(STYLES)],
                noisy=quantity.noisy and not name.startswith("eval"),
                dots=name.startswith("eval"),
            )
            for i, (label, run) in enumerate(runs)
            if name in run.metrics
        ]
        pictures.append(draw(title, lines, quantity, _last_step([run for _, run in runs]), alone=False))
    return pictures


def draw(title: str, lines: Sequence[Line], quantity: Quantity, last_step: int, alone: bool = True) -> Picture:
    """One figure of curves over steps, from 0 to `last_step` like those beside it.

    alone: of one run; it names its curves and shows what the means go through.
    """
    drawn, (axes,) = figure(_WIDTH_INCHES, _HEIGHT_INCHES)
    means = [_draw_line(axes, line, alone) for line in lines]
    values = [value for line in lines for value in line.series.values]
    note = "The strong line is the mean of its neighborhood." if alone and any(means) else ""
    if quantity.wide and min(values) > 0 and spread(values) > _LOGARITHMIC:
        axes.set_yscale("log")
    else:
        _lift_flat(axes, min(values), max(values))
        axes.yaxis.set_major_formatter(_numbers(max(map(abs, values))))
    if quantity.share:
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.005))
    axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")
    if alone and len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    return Picture(title, svg(drawn), note)


def _draw_line(axes: Axes, line: Line, faint: bool) -> bool:
    """Returns: whether a mean was drawn."""
    noisy = line.noisy and len(line.series.steps) > _NOISY
    shown = thinned(line.series)
    style = {"color": line.color, "linestyle": line.dashes}
    if noisy and faint:
        axes.plot(*shown, linewidth=0.7, alpha=0.4, **style)
    marker = "o" if line.dots or len(shown.steps) == 1 else None
    best = thinned(smoothed(line.series)) if noisy else shown
    few = len(best.steps) <= 30
    axes.plot(*best, label=line.name, linewidth=1.5, marker=marker if few else None, markersize=3.5, **style)
    return noisy


def _lift_flat(axes: Axes, low: float, high: float) -> None:
    """A curve that does not change is a line across the middle, not noise magnified."""
    if high - low <= 0.02 * abs(high):
        axes.set_ylim(min(0.9 * low, 1.1 * low), max(1.1 * high, 0.9 * high) or 1.0)


def _numbers(largest: float) -> Callable[[float, object], str]:
    def text(value: float, place: object) -> str:
        if largest and (largest < 1e-2 or largest >= 1e6):
            return f"{value:.3g}" if value else "0"
        return f"{value:,.0f}" if largest >= 1000 else f"{value:g}"

    return lambda value, place: text(round(value, 12), place)


def _last_step(runs: Sequence[Run]) -> int:
    return max((series.steps[-1] for run in runs for series in run.metrics.values()), default=0) or 1


def _names(run: Run, quantity: Quantity) -> list[str]:
    return [name for name in run.metrics if re.fullmatch(quantity.names, name)]


def _one_set(names: Collection[str], run: Run) -> bool:
    """Whether the loss by evaluation set, if any, is the `eval_loss` that stands beside the training loss already."""
    return len(names) < 2 and all(run.metrics[name] == run.metrics.get("eval_loss") for name in names)


def _label(name: str) -> str:
    return {"loss": "training", "eval_loss": "held out"}.get(
        name, name.removeprefix("eval/").rpartition("/")[0] or name
    )


def _of_set(name: str) -> str:
    """The evaluation set that a metric is about."""
    if name == "loss":
        return ", training"
    if name == "eval_loss":
        return ", held out"
    return f", {name.removeprefix('eval/').rpartition('/')[0]}" if name.startswith("eval/") else ""
