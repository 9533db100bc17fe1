"""Several runs beside one another: what they set differently, how they ended, the best of each figure, their curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.report.curves import STYLES, overlaid
from finetune.report.environment import page_environment
from finetune.report.facts import FIGURES, Figure
from finetune.report.run import Run
from finetune.report.settings import differing
from finetune.system.atomic import write_text
from finetune.system.console import printable

_LONGEST_CELL = 40
_SIDE_BY_SIDE = 5  # so many runs are columns; more are lines


@dataclass(frozen=True)
class Row:
    """One setting or one figure of every run, as text. best: places of the best values, none where it has no best."""

    label: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Comparison:
    """labels: of the runs. notes: what a reader of the figures must know."""

    labels: tuple[str, ...]
    runs: tuple[Run, ...]
    settings: tuple[Row, ...]
    figures: tuple[Row, ...]
    notes: tuple[str, ...]


def compare(runs: Sequence[Run]) -> Comparison:
    """Runs of any length, finished or not."""
    settings = differing([run.config for run in runs])
    figures = [Row("status", tuple(run.status for run in runs))]
    for figure in FIGURES:
        values = [run.figure(figure.name) for run in runs]
        if any(value is not None for value in values):
            cells = tuple("" if value is None else figure.form(value) for value in values)
            figures.append(Row(figure.label, cells, best_places(figure, values)))
    return Comparison(
        labels_of([run.folder for run in runs]),
        tuple(runs),
        tuple(Row(key, tuple(values)) for key, values in settings.items()),
        tuple(figures),
        _notes(settings),
    )


def best_places(figure: Figure, values: Sequence[float | None]) -> frozenset[int]:
    """Places of the best value; none where all are equal, or where neither more nor less is better."""
    known = [value for value in values if value is not None]
    if figure.lower_is_better is None or len(set(known)) < 2:
        return frozenset()
    best = min(known) if figure.lower_is_better else max(known)
    return frozenset(place for place, value in enumerate(values) if value == best)


def labels_of(folders: Sequence[Path]) -> tuple[str, ...]:
    """The shortest ends of the paths that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return tuple(labels)


def _notes(settings: dict[str, list[str]]) -> tuple[str, ...]:
    notes = []
    measured = [key for key in settings if key.startswith(("data.eval", "data.held_out", "data.train_on"))]
    if measured:
        notes.append(f"the held-out rows or their targets differ ({', '.join(measured)}), so held-out figures do too")
    if "distill.objective" in settings:
        notes.append(
            "the objectives differ: the held-out loss of recover is nats from the teacher, that of others nats a target"
        )
    if "generation.num_examples" in settings:
        notes.append("exact match is of different numbers of rows (generation.num_examples)")
    if any(key in settings for key in ("model.tokenizer", "model.name")):
        notes.append("the base or its tokenizer differs: nats a token compare only where the tokens are the same")
    return tuple(notes)


def as_text(comparison: Comparison) -> str:
    """A table to print, which is markdown as well; the best of a figure has a star."""
    rows = [["", *comparison.labels]]
    for row in (*comparison.settings, *comparison.figures):
        rows.append([row.label, *(f"{cell} *" if i in row.best else cell for i, cell in enumerate(row.cells))])
    if len(comparison.labels) > _SIDE_BY_SIDE:
        rows = [list(column) for column in zip(*rows, strict=True)]
    return text_table(rows)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the head first, as an aligned markdown table; long cells are cut."""
    cells = [[_cell(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(text: str) -> str:
    text = printable(" ".join(text.split())).replace("|", "\\|")
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 1]}…"


def write_comparison(file: Path, title: str, comparison: Comparison) -> None:
    """The page with table and curves, written whole or not at all. Raises: OSError."""
    labeled = list(zip(comparison.labels, comparison.runs, strict=True))
    template = page_environment().get_template("compare.html")
    page = template.render(
        title=title,
        comparison=comparison,
        styles=[swatch(i) for i in range(len(labeled))],
        pictures=overlaid(labeled),
    )
    write_text(file, page)


def swatch(place: int) -> tuple[str, str]:
    """Stroke and dash pattern of the run at this place, as SVG writes them."""
    color, dashes = STYLES[place % len(STYLES)]
    number = place % 7 + 1
    stroke = "currentColor" if number == 7 else f"var(--line-{number}, {color})"
    return stroke, {"-": "none", "--": "5 3", ":": "1 2"}[dashes]
