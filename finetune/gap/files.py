"""A gap table in a folder: for programs, for readers, and as a picture."""

from __future__ import annotations

from pathlib import Path

from finetune.evaluation.gap_table import MARKDOWN, PICTURE, GapTable, save_gap
from finetune.evaluation.gap_text import gap_figure, gap_markdown
from finetune.files import write_text
from finetune.plotting import save_png


def write_gap(table: GapTable, folder: Path) -> None:
    """gap.md, gap.png and gap.json, each in one rename; those of an earlier measuring are replaced."""
    write_text(folder / MARKDOWN, gap_markdown(table))
    if any(model.sets for model in table.models):
        save_png(gap_figure(table), folder / PICTURE)
    save_gap(table, folder)
