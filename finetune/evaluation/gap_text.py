"""The gap table as markdown and as a picture, and its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.evaluation.gap_table import JSON, MARKDOWN, PICTURE, GapTable, ModelFigures, to_json
from finetune.evaluation.intervals import Estimate
from finetune.system.atomic import write_text
from finetune.system.errors import FinetuneError, os_errors_as
from finetune.system.format import format_bytes, markdown_table
from finetune.system.plotting import COLORS, figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Format = Callable[[float], str]
_nats: Format = "{:.4f}".format


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _short(value: float) -> str:
    return f"{value:,.3f}" if abs(value) < 1000 else f"{value:.3g}"


# Figures in the order of the table: name, label and format.
FIGURES: dict[str, tuple[str, Format]] = {
    "loss": ("loss, nats", _nats),
    "perplexity": ("perplexity", _short),
    "accuracy": ("token accuracy, %", _share),
    "score": ("{metric}, %", _share),
    "kl": ("KL from {reference}, nats", _nats),
    "kl_p99": ("99th percentile of it", _short),
    "top1": ("same first choice, %", _share),
}


class Block(NamedTuple):
    """A part of the table's text; `rows` has the head first, and is empty for text alone."""

    title: str
    text: str
    rows: list[list[str]]


def write_gap(table: GapTable, folder: Path) -> list[Path]:
    """Write gap.md, gap.png and gap.json, each in one rename, and return the files.

    A table of tasks alone has no picture.
    """
    with os_errors_as(FinetuneError, f"out={folder}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PICTURE).unlink(missing_ok=True)
        write_text(folder / MARKDOWN, gap_markdown(table))
        if any(model.sets for model in table.models):
            save_png(gap_figure(table), folder / PICTURE)
        write_text(folder / JSON, to_json(table))
    return [folder / name for name in (JSON, MARKDOWN, PICTURE) if (folder / name).exists()]


def gap_markdown(table: GapTable) -> str:
    """Render the table with its intervals: a column per model, a section per dataset, one for the tasks."""
    parts = [f"# {table.model}" if table.adapter is None else f"# {table.adapter} on {table.model}"]
    for title, text, rows in gap_blocks(table):
        parts += [f"## {title}"] if title else []
        parts += [text] if text else []
        parts += [markdown_table(rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def gap_blocks(table: GapTable) -> list[Block]:
    """Return the parts of the table's text."""
    intervals = f"In brackets are 95 % intervals ({table.resamples:,} resamples of the rows, paired)."
    blocks = [Block("", intervals, [])]
    for i, rows in enumerate(table.models[0].sets if table.models else []):
        kind = " (other tasks: what training may have harmed)" if rows.forgetting else ""
        answered = f", {rows.answered:,} answered" if rows.answered else ""
        text = f"{rows.rows:,} rows, {rows.tokens:,} target tokens{answered}."
        head, *lines = _lines(table, table.models, [model.sets[i].figures for model in table.models])
        stored = ["bytes", *(format_bytes(model.stored_bytes) for model in table.models)]
        blocks.append(Block(f"{rows.name}{kind}", text, [head, stored, *lines]))
        if others := [model for model in table.models if model.sets[i].differences]:
            lines = _lines(table, others, [model.sets[i].differences for model in others], sign=True)
            blocks.append(Block("", f"Difference from {_reference(table)} on the same rows:", lines))
    if any(model.tasks for model in table.models):
        lines = [["task", "metric", "rows", *(model.name for model in table.models)]]
        for k, task in enumerate(table.models[0].tasks):
            cells = [_cell(model.tasks[k].estimate, _nats) for model in table.models]
            lines.append([task.task, task.metric, f"{task.rows:,}", *cells])
        blocks.append(Block("Tasks of lm-evaluation-harness", "", lines))
    date, device = table.made_with.get("date", "")[:10], table.made_with.get("device", "")
    versions = ", ".join(f"{name} {table.made_with[name]}" for name in ("finetune", "torch") if name in table.made_with)
    made = f"Measured {date} in {table.seconds:,.0f} s on {device} with {versions}, seed {table.seed}."
    return [*blocks, Block("", made, [])]


def _lines(
    table: GapTable, models: Sequence[ModelFigures], found: Sequence[Mapping[str, Estimate]], sign: bool = False
) -> list[list[str]]:
    """A line per figure that a model has. found: the figures of each model."""
    lines = [["", *(model.name for model in models)]]
    for name, (_, form) in FIGURES.items():
        if any(name in figures for figures in found):
            lines.append([_label(table, name), *(_cell(figures.get(name), form, sign) for figures in found)])
    return lines


def _label(table: GapTable, name: str) -> str:
    return FIGURES[name][0].format(metric=table.metric, reference=_reference(table))


def _reference(table: GapTable) -> str:
    return next((model.name for model in table.models if model.variant == table.reference), "nothing")


def _cell(estimate: Estimate | None, form: Format, sign: bool = False) -> str:
    if estimate is None:
        return ""
    value, low, high = (
        ("+" if sign and number > 0 else "") + form(number) for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def gap_figure(table: GapTable) -> Figure:
    """Draw a panel per figure, a line per model, a color per dataset."""
    sets = [f"{rows.name} (forgetting)" if rows.forgetting else rows.name for rows in table.models[0].sets]
    known = {name for model in table.models for rows in model.sets for name in rows.figures}
    names = [name for name in ("loss", "accuracy", "score", "kl") if name in known]
    lines = len(table.models) * max(1.6, len(sets))
    height = 1.2 + 0.26 * lines + (0.3 if len(sets) > 1 else 0)
    drawn, panels = figure(2.6 * len(names) + 1.4, height, panels=max(1, len(names)))
    for panel, name in zip(panels, names, strict=False):
        for i in range(len(sets)):
            _draw(panel, table, name, i)
        panel.set_title(_label(table, name))
        panel.set_ylim(len(table.models) - 0.5, -0.5)
        panel.set_yticks(range(len(table.models)), [""] * len(table.models))
        panel.grid(False, axis="y")
        for border in range(1, len(table.models)):
            panel.axhline(border - 0.5, color="black", alpha=0.2, linewidth=0.8)
    labels = [f"{model.name}\n{format_bytes(model.stored_bytes)}" for model in table.models]
    panels[0].set_yticks(range(len(table.models)), labels)
    if len(sets) > 1:
        for i, name in enumerate(sets):
            panels[0].plot([], [], "o", color=COLORS[i % len(COLORS)], label=name)
        drawn.legend(loc="outside lower center", ncols=len(sets), frameon=False)
    return drawn


def _draw(panel: Axes, table: GapTable, name: str, i: int) -> None:
    scale = 100 if name in ("accuracy", "score") else 1
    sets = len(table.models[0].sets)
    spread = min(0.4, 0.8 / sets)
    color = COLORS[i % len(COLORS)]
    above: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "color": "black"}
    for line, model in enumerate(table.models):
        found = model.sets[i].figures.get(name)
        if found is None:
            continue
        x, y = scale * found.value, line + spread * (i - (sets - 1) / 2)
        ends = [[scale * max(0.0, found.value - found.low)], [scale * max(0.0, found.high - found.value)]]
        panel.errorbar([x], [y], xerr=ends, fmt="o", color=color, markersize=4, capsize=2, linewidth=1.2)
        far = model.sets[i].figures.get("kl_p99") if name == "kl" else None
        if far is not None:
            panel.plot([far.value], [y], "D", markerfacecolor="none", markersize=4, color=color)
        panel.annotate(FIGURES[name][1](found.value), (x, y), xytext=(0, 4), fontsize=7, **above)
    if name == "kl":
        panel.set_xscale("symlog", linthresh=1e-4)
        panel.margins(x=0.15)
        panel.set_xlabel("dot: mean; diamond: 99th percentile")
    elif scale == 100:
        panel.set_xlim(-12, 112)
        panel.set_xticks(range(0, 101, 25))
    else:
        panel.margins(x=0.18)
