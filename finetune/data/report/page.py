"""The report and the rows as one HTML page: no network, no script, light and dark; text of others is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.data.report.advice import Advice
from finetune.data.report.figures import Bin, Report
from finetune.data.report.rows import ShownRow, factor_of, weighted_runs
from finetune.data.report.text import describe_order, describe_part, describe_template
from finetune.terminal import printable

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
    page = page_environment().get_template("page.html").stream(
        report=report, advice=advice, rows=rows,
        template=describe_template(report), order=describe_order(report.order), describe=describe_part,
    )  # fmt: skip
    stream.writelines(page)


def page_environment(*folders: Path) -> Environment:
    """Templates of these folders and of this one: escaped, strict about names, control characters made visible.

    look.css is how the package's pages look; parts.html draws rows and their lengths.
    """
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
        # HTML's own escaping leaves control characters as they are.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    functions: dict[str, Any] = {"chart_of": chart_of, "factor": factor_of, "runs": weighted_runs}
    environment.globals.update(functions)
    return environment


def chart_of(bins: Sequence[Bin], limit: int) -> Chart:
    """A bar for each bin, one below another; the fullest has the whole width, and a single row is seen."""
    most = max(item.rows for item in bins)
    bars = tuple(
        Bar(
            f"{item.first:,} – {item.last:,}", item.rows, index * _ROW_PIXELS,
            max(1.0, round(_BAR_PIXELS * item.rows / most, 1)) if item.rows else 0.0, item.first > limit,
        )
        for index, item in enumerate(bins)
    )  # fmt: skip
    within = sum(not bar.over for bar in bars)
    return Chart(
        bars, _LABEL_PIXELS + _BAR_PIXELS + _COUNT_PIXELS, len(bars) * _ROW_PIXELS, _LABEL_PIXELS,
        within * _ROW_PIXELS - 0.5 if within < len(bars) else None,
    )  # fmt: skip
