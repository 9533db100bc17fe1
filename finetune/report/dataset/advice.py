"""Warn about problems of a dataset, and name the setting that solves each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from finetune.config.schema import RunConfig
from finetune.report.dataset.statistics import UNTEMPLATED, PartReport, Report

_FEW_TARGETS = 0.01  # share of the tokens
_MANY_DUPLICATES = 0.01  # share of the rows
_POOR_FILL = 0.8  # share of the capacity of packed sequences
_ENOUGH_SEQUENCES = 10  # to judge packing
_LENGTH_BIAS = 0.8  # share of the pairs
# Good over bad answers, each times its weight. Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.2.
# The lower limit leaves room for weights of three digits.
_BALANCED = (0.99, 4 / 3)


@dataclass(frozen=True, slots=True)
class Advice:
    """A warning; `leak` makes the run's metrics wrong, `look` can be intended."""

    level: Literal["leak", "look"]
    text: str


def advise(report: Report, cfg: RunConfig, end_token: str | None) -> list[Advice]:
    """Return all warnings, leaks first; `end_token` is the warning about the token that ends a turn, if any."""
    trained = [part.formats for part in report.parts if part.section == "train"]
    chats = frozenset().union(*trained) - UNTEMPLATED
    looks = [text for part in report.parts for text in _about_part(part)]
    looks += [end_token] if end_token and chats else []
    looks += [
        *_about_preferences(report, cfg),
        *_about_prompts(report, cfg),
        *_about_rows(report),
        *_about_order(report, cfg),
    ]
    leaks = [
        f"{part.name}: {rows:,} of {_rows(part.figures.rows)} are also training rows of {name}, so its metrics are "
        "optimistic; remove them from one of the two"
        for part in report.parts
        for name, rows in (part.figures.shared if part.section != "train" else ())
    ]
    return [Advice("leak", text) for text in leaks] + [Advice("look", text) for text in looks]


def _about_part(part: PartReport) -> Iterator[str]:
    figures = part.figures
    if bad := figures.left_out["bad rows"]:
        yield f"{part.name}: {_rows(bad)} skipped as unusable, listed in {part.bad_rows}"
    if part.section == "train" and part.prompts is None and figures.target_share < _FEW_TARGETS:
        yield (
            f"{part.name}: only {figures.target_share:.2%} of the tokens are targets; shorten the prompts, or change "
            "data.train_on"
        )
    if figures.control_tokens:
        yield (
            f"{part.name}: {figures.control_tokens:,} control tokens in the text of {_rows(figures.control_rows)}, "
            f"first in {figures.control_place}; they are encoded as plain text"
        )


def _about_rows(report: Report) -> Iterator[str]:
    figures = report.training
    if figures.too_long:
        lost = figures.tokens - figures.kept_tokens
        effect = {
            "drop": f"left out, with {lost:,} tokens",
            "left": f"cut at the beginning, {lost:,} tokens in all",
            "right": f"cut at the end, {lost:,} tokens in all",
            "split": f"split, into {figures.documents:,} documents in all",
        }.get(report.truncation, "refused")
        rows = f"{_rows(figures.too_long)} ({figures.too_long / figures.rows:.1%})"
        yield (
            f"data.max_length={report.max_length}: {rows} longer and {effect}; "
            f"the longest has {figures.lengths.longest.tokens:,} tokens, 95 % have at most {figures.lengths.most:,}"
        )
    if figures.duplicates and figures.duplicates >= _MANY_DUPLICATES * figures.rows:
        yield (
            f"duplicates: {figures.duplicates:,} of {_rows(figures.rows)} ({figures.duplicates / figures.rows:.1%}) "
            "repeat an earlier training row"
        )


def _about_preferences(report: Report, cfg: RunConfig) -> Iterator[str]:
    figures = report.preferences
    if figures is None:
        return
    if figures.chosen_longer_share > _LENGTH_BIAS:
        good, bad = figures.mean_tokens
        yield (
            f"length: the chosen answer is longer in {figures.chosen_longer_share:.0%} of the pairs (mean tokens: "
            f"chosen {good:.0f}, rejected {bad:.0f}), so the model learns to write longer; add pairs with a shorter "
            "chosen answer, or set preference.objective=simpo, which compares means per token"
        )
    if figures.equal:
        yield f"equal pairs: {_rows(figures.equal)} with two equal answers left out; remove them"
    if figures.prefixes:
        yield (
            f"prefixes: in {_rows(figures.prefixes)} one answer begins with the other, so only their ends differ; "
            "check that no answer was cut"
        )
    if cfg.preference.objective == "kto":
        yield from _about_labels(report, cfg)


def _about_prompts(report: Report, cfg: RunConfig) -> Iterator[str]:
    figures = report.prompts
    if figures is None:
        return
    if figures.no_room:
        answer, share = cfg.reward.max_new_tokens, figures.no_room / figures.rows
        yield (
            f"prompts: {_rows(figures.no_room)} ({share:.1%}) left out: data.max_length={report.max_length} has "
            f"no room for reward.max_new_tokens={answer} after them; the longest has {figures.longest:,} tokens: set "
            f"data.max_length={figures.longest + answer}, or lower reward.max_new_tokens"
        )
    if figures.unanswered:
        yield (
            f"expected answers: missing in {_rows(figures.unanswered)} of {figures.rows:,}; rewards that compare, as "
            "exact or number, need them"
        )


def _about_labels(report: Report, cfg: RunConfig) -> Iterator[str]:
    for part in report.parts:
        found = part.preferences
        if part.section == "train" and found is not None and 0 in (found.good, found.bad):
            given, missing = ("good", "bad") if found.good else ("bad", "good")
            yield f"{part.name}: every answer is {given}; kto learns from the difference, so add {missing} answers"
    figures = report.preferences
    if figures is None or 0 in (figures.good, figures.bad):
        return
    least, most = _BALANCED
    ratio = figures.good / figures.bad
    weighted = ratio * cfg.preference.desirable_weight / cfg.preference.undesirable_weight
    if not least <= weighted <= most:
        good, bad = (1, ratio) if ratio > 1 else (1 / ratio, 1)
        yield (
            f"labels: {figures.good:,} good and {figures.bad:,} bad answers; to give both the same total weight, set "
            f"preference.desirable_weight={good:.3g} preference.undesirable_weight={bad:.3g}"
        )


def _about_order(report: Report, cfg: RunConfig) -> Iterator[str]:
    order = report.order
    if cfg.data.stream_rows is not None:
        yield (
            f"data.stream_rows={cfg.data.stream_rows}: training packs that many rows at a time, so its epoch differs "
            "slightly from this report"
        )
    if order.sequences < cfg.train.batch_size:
        advice = " or set data.packing=false" if cfg.data.packing else ""
        yield (
            f"train.batch_size={cfg.train.batch_size}: all rows fill only {order.sequences} sequences, so an epoch is "
            f"one step; lower it{advice}"
        )
    if order.fill is not None and order.fill < _POOR_FILL and order.sequences >= _ENOUGH_SEQUENCES:
        yield f"data.max_length: packed sequences are {order.fill:.0%} full; raise it to pack more rows into each"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
