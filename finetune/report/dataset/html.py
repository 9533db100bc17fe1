"""Write the report on a dataset as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from finetune.report.dataset.advice import Advice
from finetune.report.dataset.examples import ShownRow, factor_of, weighted_runs
from finetune.report.dataset.statistics import Bin, Report
from finetune.report.dataset.terminal import describe_order, describe_part, describe_template
from finetune.report.environment import render_page

_ROW_PIXELS, _LABEL_PIXELS, _BAR_PIXELS, _COUNT_PIXELS = 22, 130, 480, 90


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a histogram, in pixels; `over`: its rows exceed data.max_length."""

    label: str
    rows: int
    y: int
    width: float
    over: bool


@dataclass(frozen=True, slots=True)
class Chart:
    """A histogram to draw; `limit_y` is data.max_length between two bars, None outside of them."""

    bars: tuple[Bar, ...]
    width: int
    height: int
    bar_x: int
    limit_y: float | None


def write_page(stream: IO[str], report: Report, advice: Sequence[Advice], rows: Sequence[ShownRow]) -> None:
    """Write the whole page; it refers to no other file and no address."""
    page = render_page(
        "dataset.html",
        **row_functions(),
        title=f"{report.name}: data report",
        report=report,
        advice=advice,
        rows=rows,
        template=describe_template(report),
        order=describe_order(report.order),
        describe=describe_part,
    )
    stream.write(page)


def row_functions() -> dict[str, Any]:
    """Return the functions that the macros for rows call."""
    return {"chart_of": chart_of, "factor": factor_of, "runs": weighted_runs}


def chart_of(bins: Sequence[Bin], limit: int) -> Chart:
    """Lay out one bar per bin; the largest has the full width, and one row is still visible."""
    most = max(item.rows for item in bins)
    bars = tuple(
        Bar(
            f"{item.first:,} – {item.last:,}",
            item.rows,
            index * _ROW_PIXELS,
            max(1.0, round(_BAR_PIXELS * item.rows / most, 1)) if item.rows else 0.0,
            item.first > limit,
        )
        for index, item in enumerate(bins)
    )
    within = sum(not bar.over for bar in bars)
    return Chart(
        bars,
        _LABEL_PIXELS + _BAR_PIXELS + _COUNT_PIXELS,
        len(bars) * _ROW_PIXELS,
        _LABEL_PIXELS,
        within * _ROW_PIXELS - 0.5 if within < len(bars) else None,
    )
