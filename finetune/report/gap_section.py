"""The quantization gap on a run's page, where `finetune eval` has measured it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.evaluation.gap_table import load_gap
from finetune.evaluation.gap_text import gap_figure, gap_markdown
from finetune.report.run import table_rows
from finetune.system.plotting import svg


@dataclass(frozen=True)
class Block:
    """A table with its title and text; `rows` has the head first, and is empty for text alone."""

    title: str
    text: str
    rows: list[list[str]]


@dataclass(frozen=True)
class Gap:
    """The picture (empty if there is nothing to draw) and the tables."""

    svg: str
    blocks: list[Block]


def read_gap(folder: Path) -> Gap | None:
    """Read the gap of a run; None if there is none. Raises IntegrityError if gap.json is corrupt."""
    table = load_gap(folder)
    if table is None:
        return None
    drawn = svg(gap_figure(table)) if any(model.sets for model in table.models) else ""
    return Gap(drawn, list(_blocks(gap_markdown(table))))


def _blocks(markdown: str) -> Iterator[Block]:
    title, text = "", ""
    for part in markdown.split("\n\n"):
        if part.startswith("# "):
            continue
        if part.startswith("#"):
            title, text = part.lstrip("# ").strip(), ""
        elif part.lstrip().startswith("|"):
            yield Block(title, text, table_rows(part))
            title, text = "", ""
        else:
            text = f"{text} {part.strip()}".strip()
    if title or text:
        yield Block(title, text, [])
