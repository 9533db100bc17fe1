"""Draw the metrics of one run, or of several runs in the same pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, cycle, product
from typing import TYPE_CHECKING, NamedTuple

from finetune.evaluation.metric_names import ANSWER_METRICS
from finetune.report.facts import learns_from_rewards, learns_preferences, number
from finetune.report.run import Run, Series
from finetune.system.plotting import COLORS, figure, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_INCHES, _HEIGHT_INCHES = 4.4, 2.5  # 9-point letters stay legible in the width of a phone.
_NOISY = 40  # of a curve with more points, a moving average is drawn
_LOGARITHMIC = 100.0  # from this ratio of largest to smallest on, the axis is logarithmic
STYLES = tuple((color, dashes) for dashes, color in product(("-", "--", ":"), COLORS))


@dataclass(frozen=True)
class Quantity:
    """A picture of metrics.

    Attributes:
        names: pattern of the metrics' names.
        factor: from the metric's unit to the title's.
        noisy: measured at every step, so drawn with a moving average.
        wide: may span powers of ten.
        share: at most 1.
        from_zero: the axis starts at 0, so that small changes look small.
        by_metric: the metrics of a picture have the same data, and different names.
    """

    title: str
    names: str
    factor: float = 1.0
    noisy: bool = False
    wide: bool = False
    share: bool = False
    from_zero: bool = False
    by_metric: bool = False


_UNIT = ", nats per target token"
_BY_SET = Quantity(f"Held-out loss by set{_UNIT}", r"eval/.*/loss", wide=True)
_LOSS = Quantity(f"Loss{_UNIT}", r"loss|eval_loss", noisy=True, wide=True)
QUANTITIES = (
    _LOSS,
    _BY_SET,
    Quantity("Reward", r"(train|eval/.*)/reward", noisy=True),
    Quantity("Mean of each reward", r"train/reward_(?!std|accuracy|margin).*", noisy=True, by_metric=True),
    Quantity("Standard deviation of rewards in a group", r"train/reward_std", noisy=True, from_zero=True),
    Quantity("Length of an answer, tokens", r"train/answer_tokens", noisy=True, from_zero=True),
    Quantity(
        "Unfinished answers, equal groups", r"train/(unfinished|equal_groups)", noisy=True, share=True, by_metric=True
    ),
    Quantity("Entropy, nats per token", r"train/entropy", noisy=True),
    Quantity("Largest sampling gap, nats", r"train/sampling_gap", noisy=True, wide=True),
    Quantity("Time to sample and judge answers, s", r"train/sampling_seconds", noisy=True, from_zero=True),
    Quantity("Clipped tokens", r"train/clipped", noisy=True, share=True, from_zero=True),
    Quantity("Divergence from the reference, nats", r"train/divergence", noisy=True, from_zero=True),
    Quantity("KL to the teacher, nats per target token", r"eval/.*/teacher_kl", wide=True),
    Quantity("KL from the reference, nats per token", r"eval/.*/reference_kl", wide=True),
    Quantity(
        "Pairs with the higher reward for the chosen answer", r"(train|eval/.*)/reward_accuracy", noisy=True, share=True
    ),
    Quantity("Reward of the chosen answer over the rejected one", r"(train|eval/.*)/reward_margin", noisy=True),
    Quantity("Log-probability of chosen answers, nats", r"(train|eval/.*)/chosen_log_prob", noisy=True),
    Quantity("Log-probability of rejected answers, nats", r"(train|eval/.*)/rejected_log_prob", noisy=True),
    Quantity("Held-out token accuracy", r"eval/.*/accuracy", share=True),
    *(
        Quantity(f"Generated answers: {label}", rf"eval/.*/{name}", share=True)
        for name, label in ANSWER_METRICS.items()
    ),
    Quantity("Learning rate", r"learning_rate"),
    Quantity("Gradient norm before clipping", r"grad_norm", noisy=True, wide=True),
    Quantity("Throughput, tokens/s", r"tokens_per_second", noisy=True),
    Quantity("Peak memory, GB", r"peak_bytes", 1e-9, from_zero=True),
)


@dataclass(frozen=True)
class Picture:
    """An SVG element with its title and a note, which may be empty.

    numbers: label and value of each curve, in place of the SVG if every curve has a single point.
    """

    title: str
    svg: str = ""
    note: str = ""
    numbers: tuple[tuple[str, str], ...] = ()


class Line(NamedTuple):
    """A curve; `held_out` values are measured now and then, so they have dots and no moving average.

    band: lower and upper ends of 95 % intervals, none if they are not measured.
    """

    name: str
    series: Series
    held_out: bool
    color: str
    dashes: str
    band: tuple[Series, ...] = ()


def run_pictures(run: Run, steps_per_epoch: int | None = None) -> list[Picture]:
    """Draw every quantity of a run; steps_per_epoch: None if it is unknown."""
    pictures: list[Picture] = []
    x_label = f"step ({steps_per_epoch:,} per epoch)" if steps_per_epoch else "step"
    for quantity in QUANTITIES:
        names = _names(run, quantity)
        if not names or (quantity is _BY_SET and _is_only_set(names, run)):
            continue
        lines = [
            _line(_label_of(name, quantity), run, name, quantity, (color, "-"))
            for name, color in zip(names, cycle(COLORS), strict=False)
        ]
        # A loss on pairs has no unit.
        title = quantity.title.replace(_UNIT, "") if learns_preferences(run) else quantity.title
        picture = draw(title, lines, quantity, _last_step([run]), x_label=x_label)
        # The first picture explains the strong line.
        pictures.append(replace(picture, note="") if any(other.note for other in pictures) else picture)
    return pictures


def overlaid(runs: Sequence[tuple[str, Run]]) -> list[Picture]:
    """Draw every quantity with all runs in one picture; `runs` has labels, and the n-th run has STYLES[n]."""
    names = dict.fromkeys(name for _, run in runs for name in run.metrics)
    last_step = _last_step([run for _, run in runs])
    pictures = []
    for quantity in QUANTITIES:
        if quantity is _BY_SET and all(_is_only_set(_names(run, quantity), run) for _, run in runs):
            continue
        for name in filter(set().union(*(_names(run, quantity) for _, run in runs)).__contains__, names):
            lines = [
                _line(label, run, name, quantity, STYLES[i % len(STYLES)])
                for i, (label, run) in enumerate(runs)
                if name in _names(run, quantity)
            ]
            part = _label_of(name, quantity) if quantity.by_metric else _set_of(name)
            title = ", ".join(filter(None, (quantity.title, part)))
            pictures.append(draw(title, lines, quantity, last_step, alone=False))
    return pictures


def _line(label: str, run: Run, name: str, quantity: Quantity, style: tuple[str, str]) -> Line:
    def scaled(metric: str) -> Series:
        steps, values = run.metrics[metric]
        return Series(steps, [value * quantity.factor for value in values])

    ends = [f"{name}_low", f"{name}_high"]
    band = tuple(scaled(end) for end in ends if end in run.metrics)
    band = band if len(band) == 2 and band[0].steps == band[1].steps else ()
    return Line(label, scaled(name), name.startswith("eval"), *style, band)


def draw(
    title: str,
    lines: Sequence[Line],
    quantity: Quantity,
    last_step: int,
    *,
    alone: bool = True,
    x_label: str = "step",
) -> Picture:
    """Draw curves over the steps from 0 to `last_step`, or return the numbers of curves with a single point.

    alone: of one run, with a legend and the noisy values.
    """
    if all(len(line.series.steps) == 1 for line in lines):
        return Picture(title, numbers=tuple(_number_of(line, quantity, len(lines) > 1) for line in lines))
    drawn, (axes,) = figure(_WIDTH_INCHES, _HEIGHT_INCHES)
    # All curves of a picture or none, so that they can be compared.
    averaged = quantity.noisy and any(len(line.series.steps) > _NOISY for line in lines if not line.held_out)
    for line in lines:
        _draw_line(axes, line, averaged and not line.held_out, alone)
    values = [value for line in lines for series in (line.series, *line.band) for value in series.values]
    notes = ["The strong line is a moving average."] if alone and averaged else []
    notes += ["The band is the 95 % interval."] if alone and any(line.band for line in lines) else []
    low, high = min(values), max(values)
    if quantity.wide and low > 0 and high / low > _LOGARITHMIC:
        axes.set_yscale("log")
    else:
        # A constant curve becomes a line across the middle instead of magnified noise.
        if high - low <= 0.02 * abs(high):
            axes.set_ylim(min(0.9 * low, 1.1 * low), max(1.1 * high, 0.9 * high) or 1.0)
        axes.yaxis.set_major_formatter(_numbers(max(map(abs, values))))
    if quantity.from_zero:
        axes.set_ylim(bottom=0)
    if quantity.share:
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.005))
    axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(x_label)
    if alone and len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    return Picture(title, svg(drawn), " ".join(notes))


def _number_of(line: Line, quantity: Quantity, several: bool) -> tuple[str, str]:
    [step], [value] = line.series
    label = f"{line.name}, step {step:,}" if several else f"step {step:,}"
    if quantity.share:
        return label, f"{value:.1%}"
    return label, f"{value:,.0f}" if abs(value) >= 1000 else number(value)


def _draw_line(axes: Axes, line: Line, averaged: bool, faint: bool) -> None:
    """Draw a curve, or its moving average; faint: over the values themselves."""
    shown = thinned(line.series)
    style = {"color": line.color, "linestyle": line.dashes}
    if line.band and faint:
        low, high = line.band
        axes.fill_between(low.steps, low.values, high.values, color=line.color, alpha=0.15, linewidth=0)
    if averaged and faint:
        axes.plot(*shown, linewidth=0.7, alpha=0.4, **style)
    marker = "o" if line.held_out or len(shown.steps) == 1 else None
    best = thinned(smoothed(line.series)) if averaged else shown
    few = len(best.steps) <= 30
    axes.plot(*best, label=line.name, linewidth=1.5, marker=marker if few else None, markersize=3.5, **style)


def _numbers(largest: float) -> Callable[[float, object], str]:
    def text(value: float, place: object) -> str:
        value = round(value, 12)
        if largest and (largest < 1e-2 or largest >= 1e6):
            return f"{value:.3g}" if value else "0"
        return f"{value:,.0f}" if largest >= 1000 else f"{value:g}"

    return text


def _last_step(runs: Sequence[Run]) -> int:
    return max((series.steps[-1] for run in runs for series in run.metrics.values()), default=0) or 1


def _names(run: Run, quantity: Quantity) -> list[str]:
    if quantity in (_LOSS, _BY_SET) and learns_from_rewards(run):
        return []
    return [name for name in run.metrics if re.fullmatch(quantity.names, name)]


def _is_only_set(names: Collection[str], run: Run) -> bool:
    """Return whether the loss by set repeats `eval_loss`, which is drawn with the training loss."""
    return len(names) < 2 and all(run.metrics[name] == run.metrics.get("eval_loss") for name in names)


def _set_of(name: str) -> str:
    """Return the data that a metric is measured on, or an empty text."""
    known = {"loss": "training", "eval_loss": "held out", "train/reward": "training"}
    return known.get(name, name.removeprefix("eval/").rpartition("/")[0])


def _label_of(name: str, quantity: Quantity) -> str:
    """Return how a curve of a picture is called."""
    if quantity.by_metric:
        return name.removeprefix("train/").removeprefix("reward_").replace("_", " ")
    return _set_of(name) or name


def thinned(series: Series, most: int = 800) -> Series:
    """Keep at most `most` points: the first, the last, and the lowest and highest of every interval of steps.

    A spike of one step among 100,000 stays visible.
    """
    count = len(series.steps)
    if count <= most:
        return series
    buckets = (most - 2) // 2
    kept = {0, count - 1}
    for bucket in range(buckets):
        places = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        kept |= {min(places, key=series.values.__getitem__), max(places, key=series.values.__getitem__)}
    places = sorted(kept)
    return Series([series.steps[i] for i in places], [series.values[i] for i in places])


def smoothed(series: Series, share: float = 0.05) -> Series:
    """Return the moving average over a window of `share` of the run."""
    count = len(series.values)
    half = max(1, round(count * share / 2))
    sums = list(accumulate(series.values, initial=0.0))
    ends = [(max(0, i - half), min(count, i + half + 1)) for i in range(count)]
    return Series(series.steps, [(sums[end] - sums[start]) / (end - start) for start, end in ends])
