"""The report and the rows as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from finetune.report.dataset.advice import Advice
from finetune.report.dataset.examples import ShownRow, factor_of, weighted_runs
from finetune.report.dataset.statistics import Bin, Report
from finetune.report.dataset.text import describe_order, describe_part, describe_template
from finetune.report.environment import page_environment

_ROW_PIXELS, _LABEL_PIXELS, _BAR_PIXELS, _COUNT_PIXELS = 22, 130, 480, 90


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of the histogram. y, width: pixels; over: its rows are longer than data.max_length."""

    label: str
    rows: int
    y: int
    width: float
    over: bool


@dataclass(frozen=True, slots=True)
class Chart:
    """A histogram to draw. limit_y: where data.max_length lies between two bars; None outside of them."""

    bars: tuple[Bar, ...]
    width: int
    height: int
    bar_x: int
    limit_y: float | None


def write_page(stream: IO[str], report: Report, advice: Sequence[Advice], rows: Sequence[ShownRow]) -> None:
    """The whole page; it names no other file and no address."""
    page = (
        page_environment(**row_functions())
        .get_template("dataset.html")
        .stream(
            report=report,
            advice=advice,
            rows=rows,
            template=describe_template(report),
            order=describe_order(report.order),
            describe=describe_part,
        )
    )
    stream.writelines(page)


def row_functions() -> dict[str, Any]:
    """What parts.html calls: it draws rows and how long they are."""
    return {"chart_of": chart_of, "factor": factor_of, "runs": weighted_runs}


def chart_of(bins: Sequence[Bin], limit: int) -> Chart:
    """A bar for each bin, one below another; the fullest has the whole width, and a single row is seen."""
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
