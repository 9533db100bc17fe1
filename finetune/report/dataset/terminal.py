"""Print the report on a dataset, in color on a terminal that supports it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from finetune.report.dataset.advice import Advice
from finetune.report.dataset.examples import CLOSE, OPEN, ShownRow, Span, factor_of, marked, visible, weighted_runs
from finetune.report.dataset.preferences import describe_preferences
from finetune.report.dataset.prompts import describe_prompts
from finetune.report.dataset.statistics import Bin, Order, PartReport, Report
from finetune.system.console import printable

_BAR_WIDTH, _INDENT = 40, 6
_COLUMNS = (9, 13, 13, 8, 12, 12)
_EIGHTHS = ("", *"▏▎▍▌▋▊▉")
_FEWEST_BINS = 4  # Fewer say no more than the lines of shortest and longest.
_HEIGHTS = "▁▂▃▄▅▆▇█"
_STYLES = {"control": "dim", "spelled": "bold red", "text": "", "media": "cyan"}
_TARGET, _WEIGHTED = "green", "yellow"


def print_report(console: Console, report: Report, advice: Sequence[Advice]) -> None:
    """Print the table, the histogram, every source and the warnings."""
    console.print(Text.assemble((printable(report.name), "bold"), (f"  for {printable(report.model)}", "dim")))
    console.print(Text(printable(describe_template(report))))
    epoch = [Text.assemble((f"{label:<10}", "bold"), text) for label, text in describe_order(report.order).items()]
    for paragraph in (_table(report), _histogram(report), _sources(report), epoch):
        console.print()
        for text in paragraph:
            console.print(text)
    console.print()
    for item in advice:
        word, style = ("LEAK", "bold red") if item.level == "leak" else ("look", "bold yellow")
        text = printable(item.text)
        if console.file.isatty():
            text = f"\n{'':{_INDENT}}".join(textwrap.wrap(text, console.width - _INDENT))
        console.print(Text.assemble((word, style), f"  {text}"))
    if not advice:
        console.print(Text("no warnings", "green"))


def print_rows(console: Console, rows: Sequence[ShownRow], targets: str = "targets") -> None:
    """Print rows with their targets in color, or between marks on a plain console. targets: how to call them."""
    colored = console.color_system is not None
    key = Text.assemble(
        (f"{targets} are green", _TARGET),
        ", ",
        (f"{factor_of(0.5)} yellow", _WEIGHTED),
        " with another loss weight, ",
        ("control tokens dim", "dim"),
    )
    console.print(key if colored else f"{targets} are between {OPEN} and {CLOSE}, with ×w for a loss weight w")
    for number, row in enumerate(rows, 1):
        cut = f" (of {row.cut_from:,})" if row.cut_from else ""
        caption = printable(f"{row.source} · {row.place} · {row.tokens:,} tokens{cut}, {row.targets:,} targets")
        console.print()
        console.print(Text(f"── row {number} of {len(rows)} · {caption}", "bold"))
        for side in row.sides:
            if side.name:
                console.print(Text(f"{side.name}: {side.tokens:,} tokens, {side.targets:,} targets", "bold dim"))
            text = _colored(side.spans) if colored else Text(marked(side.spans))
            console.print(text, end="" if text.plain.endswith("\n") else "\n")


def _colored(spans: Sequence[Span]) -> Text:
    text = Text()
    for weight, run in weighted_runs(spans):
        color = "" if not weight else _TARGET if weight == 1 else _WEIGHTED
        text.append(f"{factor_of(weight)} " if color == _WEIGHTED else "", color)
        for span in run:
            text.append(visible(span), f"{_STYLES[span.kind]} {color}".strip())
    return text


def describe_template(report: Report) -> str:
    """Describe the template and the tokens that end turns and documents."""
    return "; ".join([f"template: {report.template}", *(f"{what} ends with {token}" for what, token in report.ends)])


def _table(report: Report) -> Iterator[Text]:
    """Yield a line for every source, and the sum of several training sources."""
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
        marked = [
            (mark.rjust(columns), "" if mark == "0" else "yellow")
            for mark, columns in zip(marks, _COLUMNS[len(cells) :], strict=True)
        ]
        yield Text.assemble(f"  {printable(name):<{width}}", *map(str.rjust, cells, _COLUMNS), *marked)


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
        # In eighths of a character; one row is still visible.
        whole, rest = divmod(max(1, round(item.rows / most * _BAR_WIDTH * 8)) if item.rows else 0, 8)
        bar = "█" * whole + _EIGHTHS[rest]
        yield Text.assemble(
            f"  {item.first:>9,} – {item.last:<9,}  ",
            (f"{bar:<{_BAR_WIDTH}}", style),
            f"{item.rows:>9,}",
        )


def _sources(report: Report) -> Iterator[Text]:
    for part in report.parts:
        yield Text.assemble(
            (printable(part.name), "bold"),
            f"  {part.section}, {part.format} rows of ",
            (printable(part.path), "dim"),
            f", weight {part.weight:g}" if part.section == "train" and part.weight != 1 else "",
        )
        facts = describe_part(part)
        if _adds_to_the_chart(part.figures.lengths.bins, report):
            facts = {"histogram": sparkline(part.figures.lengths.bins, report.max_length)} | facts
        for label, text in facts.items():
            yield Text.assemble((f"  {label:<11}", "dim"), printable(text))


def _adds_to_the_chart(bins: Sequence[Bin], report: Report) -> bool:
    """Return whether a source's histogram is not the chart of all training rows, and more than a few bins."""
    return bins != report.training.lengths.bins and len(bins) >= _FEWEST_BINS


def sparkline(bins: Sequence[Bin], limit: int) -> str:
    """Draw a histogram in a line: one character per bin, and │ at data.max_length."""
    most = max(item.rows for item in bins)
    heights = [" " if not item.rows else _HEIGHTS[-(-item.rows * len(_HEIGHTS) // most) - 1] for item in bins]
    within = sum(item.last <= limit for item in bins)
    line = "".join(heights[:within]) + "│" * (0 < within < len(bins)) + "".join(heights[within:])
    return f"{bins[0].first:,} {line} {bins[-1].last:,} tokens"


def describe_part(part: PartReport) -> dict[str, str]:
    """Describe a source, by subject."""
    figures, lengths = part.figures, part.figures.lengths
    facts = {
        "lengths": f"half of the rows have at most {lengths.median:,} tokens, 95 % at most {lengths.most:,}",
        "shortest": f"{lengths.shortest.tokens:,} tokens, {lengths.shortest.place}",
        "longest": f"{lengths.longest.tokens:,} tokens, {lengths.longest.place}",
        "media": "; ".join(
            f"{each.files:,} × {each.kind}, {each.tokens:,} tokens, at most {each.most:,} per file"
            for each in figures.media
        ),
        "left out": ", ".join(f"{reason}: {rows:,}" for reason, rows in figures.left_out.items()),
        "shared": ", ".join(f"{rows:,} rows with {name}" for name, rows in figures.shared),
    }
    shown = {label: text for label, text in facts.items() if text}
    if part.preferences is not None:
        shown |= describe_preferences(part.preferences)
    return shown if part.prompts is None else shown | describe_prompts(part.prompts)


def describe_order(order: Order) -> dict[str, str]:
    """Describe an epoch and the run, in one line each."""

    def count(number: int, word: str) -> str:
        return f"1 {word}" if number == 1 else f"{number:,} {word}s"

    fill = "" if order.fill is None else f", {order.fill:.1%} full"
    return {
        "epoch": f"{count(order.sequences, 'sequence')}{fill}, {order.tokens:,} tokens, {count(order.steps, 'step')}",
        "run": f"{count(order.total_steps, 'step')}, {order.total_steps / order.steps:.3g} epochs",
    }
