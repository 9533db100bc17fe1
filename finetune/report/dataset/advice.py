"""What looks wrong in a report on data, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from finetune.config.schema import RunConfig
from finetune.report.dataset.statistics import UNTEMPLATED, PartReport, Report

_FEW_TARGETS = 0.01  # of the tokens
_MANY_DUPLICATES = 0.01  # of the rows
_POOR_FILL = 0.8  # of the room in packed sequences
_ENOUGH_SEQUENCES = 10  # to judge the packing by


@dataclass(frozen=True, slots=True)
class Advice:
    """level: `leak` makes the run's figures wrong; `look` may be meant."""

    level: Literal["leak", "look"]
    text: str


def advise(report: Report, cfg: RunConfig, end_token: str | None) -> list[Advice]:
    """Everything about the data that a user should know before training; leaks first.

    end_token: what there is to say about the token that ends a turn.
    """
    chats = {part.format for part in report.parts if part.section == "train"} - UNTEMPLATED
    looks = [text for part in report.parts for text in _about_part(part, report)]
    looks += [end_token] if end_token and chats else []
    looks += [*_about_length(report), *_about_duplicates(report), *_about_order(report, cfg)]
    return [Advice("leak", text) for text in _leaks(report)] + [Advice("look", text) for text in looks]


def _leaks(report: Report) -> Iterator[str]:
    for part in report.parts:
        for name, rows in part.figures.shared if part.section != "train" else ():
            yield (
                f"{part.name}: {rows:,} of its {part.figures.rows:,} rows are training rows of {name} too, so its "
                "figures flatter; take them out on one side"
            )


def _about_part(part: PartReport, report: Report) -> Iterator[str]:
    figures = part.figures
    if bad := figures.left_out["bad rows"]:
        yield f"{part.name}: {_rows(bad)} cannot be used and {_are(bad)} skipped; listed in {part.bad_rows}"
    if part.section == "train" and figures.target_share < _FEW_TARGETS:
        yield (
            f"{part.name}: {figures.target_share:.2%} of the tokens are targets, so nearly all of the work teaches "
            "nothing; shorten the prompts, or see data.train_on"
        )
    if figures.control_tokens:
        yield (
            f"{part.name}: {_rows(figures.control_rows)} spell{'s' * (figures.control_rows == 1)} out control tokens, "
            f"{figures.control_tokens:,} in all, first {figures.control_place}; they are trained on as plain text"
        )


def _about_length(report: Report) -> Iterator[str]:
    figures, limit = report.training, report.max_length
    if not figures.too_long:
        return
    share = f"{_rows(figures.too_long)} ({figures.too_long / figures.rows:.1%})"
    lost = figures.tokens - figures.kept_tokens
    fate = {
        "drop": f"left out, with {lost:,} tokens",
        "left": f"cut at their beginning, {lost:,} tokens in all",
        "right": f"cut at their end, {lost:,} tokens in all",
        "split": f"split into pieces, {figures.documents:,} documents in all",
    }.get(report.truncation, "refused")
    yield (
        f"{share} {_are(figures.too_long)} longer than data.max_length={limit} and {fate}; the longest has "
        f"{figures.lengths.longest.tokens:,} tokens, 95 % have at most {figures.lengths.most:,}"
    )


def _about_duplicates(report: Report) -> Iterator[str]:
    figures = report.training
    if figures.duplicates >= _MANY_DUPLICATES * figures.rows and figures.duplicates:
        yield (
            f"{figures.duplicates:,} of {figures.rows:,} training rows repeat an earlier one "
            f"({figures.duplicates / figures.rows:.1%}), and are trained on that much more often"
        )


def _about_order(report: Report, cfg: RunConfig) -> Iterator[str]:
    order = report.order
    if cfg.data.stream_rows is not None:
        yield (
            f"training packs data.stream_rows={cfg.data.stream_rows} rows at a time, so its epoch differs a little "
            "from the one told here"
        )
    if order.sequences < cfg.train.batch_size:
        way_out = " or set data.packing=false" if cfg.data.packing else ""
        yield (
            f"all rows fill {order.sequences} of the train.batch_size={cfg.train.batch_size} sequences that a step may "
            f"have, so an epoch is a single step; lower it{way_out}"
        )
    if order.fill is not None and order.fill < _POOR_FILL and order.sequences >= _ENOUGH_SEQUENCES:
        yield (
            f"packed sequences are {order.fill:.0%} full, since rows are nearly as long as data.max_length; "
            "raise it, and fewer sequences hold as much"
        )


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
