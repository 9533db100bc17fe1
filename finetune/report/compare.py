"""Compare runs: their settings, results and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.report.curves import STYLES, overlaid
from finetune.report.environment import render_page
from finetune.report.facts import FIGURES, Figure, figure_of
from finetune.report.run import Run
from finetune.report.settings import differing
from finetune.system.atomic import write_text
from finetune.system.console import printable
from finetune.system.format import markdown_table

_LONGEST_CELL = 40
_MOST_COLUMNS = 5  # more runs are rows
# Beginnings of settings whose difference makes results not comparable.
_NOT_COMPARABLE = {
    ("data.eval", "data.held_out", "data.train_on"): "differs, so held-out results are not comparable",
    (
        "reward.functions",
        "reward.pattern",
        "reward.format",
        "reward.json_schema",
        "reward.length",
    ): "differs, so rewards measure different things",
    ("distill.objective",): "differs; the held-out loss of recover is KL to the teacher",
    ("generation.num_examples",): "differs, so exact match and rewards cover different numbers of examples",
    ("model.name", "model.tokenizer"): "differs; nats per token are comparable only with the same tokens",
}


@dataclass(frozen=True)
class Row:
    """One setting or result of every run, as text; `best` holds the places of the best values."""

    label: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Comparison:
    """The table of several runs; `notes` are reasons why results are not comparable."""

    labels: tuple[str, ...]
    runs: tuple[Run, ...]
    settings: tuple[Row, ...]
    figures: tuple[Row, ...]
    notes: tuple[str, ...]


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs of any length, finished or not."""
    settings = differing([run.config for run in runs])
    figures = [Row("status", tuple(run.status for run in runs))]
    for figure in FIGURES:
        values = [figure_of(run, figure) for run in runs]
        if any(value is not None for value in values):
            cells = tuple("" if value is None else figure.form(value) for value in values)
            figures.append(Row(figure.label, cells, best_places(figure, values)))
    notes = []
    for keys, note in _NOT_COMPARABLE.items():
        if found := [key for key in settings if key.startswith(keys)]:
            notes.append(f"{', '.join(found)}: {note}")
    return Comparison(
        labels_of([run.folder for run in runs]),
        tuple(runs),
        tuple(Row(key, tuple(values)) for key, values in settings.items()),
        tuple(figures),
        tuple(notes),
    )


def best_places(figure: Figure, values: Sequence[float | None]) -> frozenset[int]:
    """Return the places of the best value as it is shown; none if all are equal, or no direction is better."""
    known = [value for value in values if value is not None]
    if figure.lower_is_better is None or len(set(map(figure.form, known))) < 2:
        return frozenset()
    best = figure.form(min(known) if figure.lower_is_better else max(known))
    return frozenset(place for place, value in enumerate(values) if value is not None and figure.form(value) == best)


def labels_of(folders: Sequence[Path]) -> tuple[str, ...]:
    """Return the shortest ends of the paths that differ."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return tuple(labels)


def as_text(comparison: Comparison) -> str:
    """Format a markdown table for the terminal, with a star at the best results."""
    rows = [["", *comparison.labels]]
    for row in (*comparison.settings, *comparison.figures):
        rows.append([row.label, *(f"{cell} *" if i in row.best else cell for i, cell in enumerate(row.cells))])
    if len(comparison.labels) > _MOST_COLUMNS:
        rows = [list(column) for column in zip(*rows, strict=True)]
    return text_table(rows)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Format an aligned markdown table; `rows` has the head first, and long cells are cut."""

    def shown(text: str) -> str:
        text = printable(" ".join(text.split())).replace("|", "\\|")
        return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 1]}…"

    return markdown_table([[shown(cell) for cell in row] for row in rows])


def write_comparison(file: Path, title: str, comparison: Comparison) -> None:
    """Write the page with the table and the curves. Raises OSError."""
    labeled = list(zip(comparison.labels, comparison.runs, strict=True))
    styles = [swatch(i) for i in range(len(labeled))]
    page = render_page("compare.html", title=title, comparison=comparison, styles=styles, pictures=overlaid(labeled))
    write_text(file, page)


def swatch(place: int) -> tuple[str, str]:
    """Return the SVG stroke and dash pattern of the run at this place."""
    color, dashes = STYLES[place % len(STYLES)]
    number = place % 7 + 1
    stroke = "currentColor" if number == 7 else f"var(--line-{number}, {color})"
    return stroke, {"-": "none", "--": "5 3", ":": "1 2"}[dashes]
