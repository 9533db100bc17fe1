"""The report and the rows for a terminal: colored where it shows colors, the same words and plain marks elsewhere."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import IO

from rich.console import Console
from rich.text import Text

from finetune.report.dataset.advice import Advice
from finetune.report.dataset.examples import CLOSE, OPEN, ShownRow, Span, factor_of, marked, visible, weighted_runs
from finetune.report.dataset.statistics import Bin, Order, PartReport, Report
from finetune.system.console import printable

_BAR_WIDTH, _INDENT = 40, 6
_COLUMNS = (9, 13, 13, 8, 12, 12)
_EIGHTHS = "▏▎▍▌▋▊▉█"
_HEIGHTS = "▁▂▃▄▅▆▇█"
_STYLES = {"control": "dim", "spelled": "bold red", "text": ""}
_TARGET, _WEIGHTED = "green", "yellow"


def console_for(stream: IO[str]) -> Console:
    """A console that writes every line whole, and plain where NO_COLOR, TERM=dumb or a pipe ask for it."""
    plain = not stream.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in (None, "", "dumb")
    return Console(
        file=stream,
        color_system=None if plain else "auto",
        force_terminal=not plain,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )


def print_report(console: Console, report: Report, advice: Sequence[Advice]) -> None:
    """Figures, the histogram, every source, and what looks wrong."""
    for text in (*_head(report), *_table(report), *_histogram(report), *_sources(report), *_epoch(report.order)):
        console.print(text)
    for item in advice:
        word, style = ("LEAK", "bold red") if item.level == "leak" else ("look", "bold yellow")
        console.print(Text.assemble((word, style), f"  {_hanging(printable(item.text), console)}"))
    if not advice:
        console.print(Text("nothing looks wrong", "green"))


def _hanging(text: str, console: Console) -> str:
    """Wrapped where a terminal would wrap it, but indented; whole lines for programs."""
    width = console.width - _INDENT
    return f"\n{'':{_INDENT}}".join(textwrap.wrap(text, width)) if console.file.isatty() else text


def print_rows(console: Console, rows: Sequence[ShownRow]) -> None:
    """Rows with their targets colored, or between marks where the console is plain."""
    colored = console.color_system is not None
    key = Text.assemble(
        ("targets are green", _TARGET),
        ", ",
        (f"{factor_of(0.5)} yellow", _WEIGHTED),
        " where their loss weighs more or less, ",
        ("control tokens dim", "dim"),
    )
    console.print(key if colored else f"targets stand between {OPEN} and {CLOSE}, with ×w where their loss weighs w")
    for number, row in enumerate(rows, 1):
        console.print()
        console.print(Text(f"── row {number} of {len(rows)} · {_caption(row)}", "bold"))
        text = _colored(row.spans) if colored else Text(marked(row.spans))
        console.print(text, end="" if text.plain.endswith("\n") else "\n")


def _caption(row: ShownRow) -> str:
    cut = f" (of {row.cut_from:,})" if row.cut_from else ""
    return printable(f"{row.source} · {row.place} · {row.tokens:,} tokens{cut}, {row.targets:,} targets")


def _colored(spans: Sequence[Span]) -> Text:
    text = Text()
    for weight, run in weighted_runs(spans):
        color = "" if not weight else _TARGET if weight == 1 else _WEIGHTED
        text.append(f"{factor_of(weight)} " if color == _WEIGHTED else "", color)
        for span in run:
            text.append(visible(span), f"{_STYLES[span.kind]} {color}".strip())
    return text


def _head(report: Report) -> Iterator[Text]:
    yield Text.assemble((printable(report.name), "bold"), (f"  for {printable(report.model)}", "dim"))
    yield Text(printable(describe_template(report)))
    yield Text()


def describe_template(report: Report) -> str:
    """Where the template is from, and what ends with which token."""
    return "; ".join([f"template: {report.template}", *(f"{what} ends with {token}" for what, token in report.ends)])


def _table(report: Report) -> Iterator[Text]:
    """A line for every source, and a sum where there are several to train on."""
    rows = [(part.section, part.name, part.figures) for part in report.parts]
    trained = sum(part.section == "train" for part in report.parts)
    if trained > 1:
        rows.insert(trained, ("train", "together", report.training))
    width = max(12, *(len(printable(name)) for _, name, _ in rows))
    heads = ("rows", "tokens", "targets", "share", "duplicates", f"over {report.max_length:,}")
    yield Text(f"  {'':<{width}}" + "".join(map(str.rjust, heads, _COLUMNS)), "dim")
    before = ""
    for section, name, figures in rows:
        if section != before:
            yield Text(section, "bold")
        before = section
        cells = (f"{figures.rows:,}", f"{figures.tokens:,}", f"{figures.targets:,}", f"{figures.target_share:.1%}")
        marks = (f"{figures.duplicates:,}", f"{figures.too_long:,}")
        yield Text.assemble(
            f"  {printable(name):<{width}}",
            *map(str.rjust, cells, _COLUMNS),
            *(
                (mark.rjust(columns), "" if mark == "0" else "yellow")
                for mark, columns in zip(marks, _COLUMNS[len(cells) :], strict=True)
            ),
        )
    yield Text()


def _histogram(report: Report) -> Iterator[Text]:
    bins, limit = report.training.lengths.bins, report.max_length
    most = max(item.rows for item in bins)
    yield Text("training rows by length in tokens", "bold")
    marked_limit = bins[0].first > limit
    for item in bins:
        if item.first > limit and not marked_limit:
            yield Text(f"  {f'─ data.max_length={limit} ':─<{_BAR_WIDTH + 30}}", "yellow")
            marked_limit = True
        style = "yellow" if item.first > limit else "cyan"
        yield Text.assemble(
            f"  {item.first:>9,} – {item.last:<9,}  ",
            (f"{_bar(item.rows, most):<{_BAR_WIDTH}}", style),
            f"{item.rows:>9,}",
        )
    yield Text()


def _bar(rows: int, most: int) -> str:
    """Its length is the share of `most`, in eighths of a character; a single row is seen."""
    eighths = max(1, round(rows / most * _BAR_WIDTH * 8)) if rows else 0
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest - 1] if rest else "")


def _sources(report: Report) -> Iterator[Text]:
    for part in report.parts:
        yield Text.assemble(
            (printable(part.name), "bold"),
            f"  {part.section}, {part.format} rows of ",
            (printable(part.path), "dim"),
            f", weight {part.weight:g}" if part.section == "train" and part.weight != 1 else "",
        )
        told = describe_part(part)
        if len(report.parts) > 1:
            told = {"histogram": sparkline(part.figures.lengths.bins, report.max_length)} | told
        for label, text in told.items():
            yield Text.assemble((f"  {label:<11}", "dim"), printable(text))
    yield Text()


def sparkline(bins: Sequence[Bin], limit: int) -> str:
    """A histogram in a line: a character a bin, │ where data.max_length lies between two."""
    most = max(item.rows for item in bins)
    heights = [" " if not item.rows else _HEIGHTS[-(-item.rows * len(_HEIGHTS) // most) - 1] for item in bins]
    within = sum(item.last <= limit for item in bins)
    line = "".join(heights[:within]) + "│" * (0 < within < len(bins)) + "".join(heights[within:])
    return f"{bins[0].first:,} {line} {bins[-1].last:,} tokens"


def describe_part(part: PartReport) -> dict[str, str]:
    """What there is to say about a source besides its place in the table, by subject."""
    figures, lengths = part.figures, part.figures.lengths
    told = {
        "lengths": f"half of the rows have at most {lengths.median:,} tokens, 95 % at most {lengths.most:,}",
        "shortest": f"{lengths.shortest.tokens:,} tokens, {lengths.shortest.place}",
        "longest": f"{lengths.longest.tokens:,} tokens, {lengths.longest.place}",
        "left out": ", ".join(f"{reason}: {rows:,}" for reason, rows in figures.left_out.items()),
        "shared": ", ".join(f"{rows:,} rows with {name}" for name, rows in figures.shared),
    }
    return {label: text for label, text in told.items() if text}


def _epoch(order: Order) -> Iterator[Text]:
    for label, text in describe_order(order).items():
        yield Text.assemble((f"{label:<10}", "bold"), text)
    yield Text()


def describe_order(order: Order) -> dict[str, str]:
    """An epoch and the run in a line each."""
    fill = "" if order.fill is None else f", {order.fill:.1%} full"
    steps = "1 step" if order.steps == 1 else f"{order.steps:,} steps"
    run = "1 step" if order.total_steps == 1 else f"{order.total_steps:,} steps"
    sequences = "1 sequence" if order.sequences == 1 else f"{order.sequences:,} sequences"
    return {
        "an epoch": f"{sequences}{fill}, {order.tokens:,} tokens, {steps}",
        "the run": f"{run}, {order.total_steps / order.steps:.3g} epochs",
    }
