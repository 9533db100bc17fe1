"""Write the report on a dataset as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

from finetune.report.dataset.advice import Advice
from finetune.report.dataset.examples import ShownRow, factor_of, weighted_runs
from finetune.report.dataset.statistics import Report
from finetune.report.dataset.terminal import describe_order, describe_part, describe_template
from finetune.report.environment import render_page


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
    """Return the functions that the macros for examples call."""
    return {"factor": factor_of, "runs": weighted_runs}
