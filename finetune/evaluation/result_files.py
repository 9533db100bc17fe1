"""A gap table in a folder: for programs, for readers, and as a picture."""

from __future__ import annotations

from pathlib import Path

from finetune.evaluation.gap_table import JSON, MARKDOWN, PICTURE, GapTable, save_gap
from finetune.evaluation.gap_text import gap_figure, gap_markdown
from finetune.system.atomic import write_text
from finetune.system.plotting import save_png


def write_gap(table: GapTable, folder: Path) -> list[Path]:
    """gap.md, gap.png and gap.json, each in one rename; those of an earlier measuring are replaced.

    A table of tasks alone has no picture. Returns: the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PICTURE).unlink(missing_ok=True)
    write_text(folder / MARKDOWN, gap_markdown(table))
    if any(model.sets for model in table.models):
        save_png(gap_figure(table), folder / PICTURE)
    save_gap(table, folder)
    return [folder / name for name in (JSON, MARKDOWN, PICTURE) if (folder / name).exists()]
