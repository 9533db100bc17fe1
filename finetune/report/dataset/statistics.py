"""Compute statistics of a run's data: rows, lengths, targets, duplicates, leaks and packing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from finetune.config.schema import RunConfig
from finetune.data.documents import leave_room
from finetune.data.loader import LoadedData, Source, is_held_out
from finetune.data.packing import SequenceOrder
from finetune.data.template.chat import ChatTemplate
from finetune.report.dataset.preferences import PreferenceFigures, preference_figures
from finetune.report.dataset.prompts import PromptFigures, prompt_figures

UNTEMPLATED = frozenset({"text", "tokens"})  # formats whose rows no chat template touches
Section = Literal["train", "eval", "held out"]


@dataclass(frozen=True, slots=True)
class Bin:
    """The number of rows with `first` to `last` tokens, inclusive."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True, slots=True)
class Extreme:
    """The longest or the shortest row."""

    tokens: int
    place: str


@dataclass(frozen=True)
class Lengths:
    """Lengths of rows in tokens, before truncation; `most` is the 95th percentile."""

    bins: tuple[Bin, ...]
    shortest: Extreme
    longest: Extreme
    median: int
    most: int


@dataclass(frozen=True)
class MediaFigures:
    """The files of one kind (image, audio or video) in rows, and their tokens; `most` is of one file."""

    kind: str
    files: int
    tokens: int
    most: int


@dataclass(frozen=True)
class Figures:
    """Statistics of one source, or of all training rows.

    Attributes:
        rows, tokens, targets: before truncation.
        documents, kept_tokens: after truncation.
        too_long: rows longer than data.max_length.
        left_out: unused rows by reason.
        duplicates: used rows that repeat an earlier one of the same source; in the total, of any source.
        shared: used rows that other training sources also hold, by source.
        control_tokens: control tokens in texts, in `control_rows` rows, first at `control_place`.
        media: by kind, before truncation.
    """

    rows: int
    tokens: int
    targets: int
    lengths: Lengths
    documents: int
    kept_tokens: int
    too_long: int
    left_out: Counter[str]
    duplicates: int
    shared: tuple[tuple[str, int], ...]
    control_tokens: int
    control_rows: int
    control_place: str
    media: tuple[MediaFigures, ...] = ()

    @property
    def target_share(self) -> float:
        return self.targets / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Part:
    """The rows [R] of a source's store that are used for training or for evaluation."""

    section: Section
    source: Source
    rows: np.ndarray


@dataclass(frozen=True)
class PartReport:
    """The statistics of one part of a source.

    formats: of its files; `format` says which.
    bad_rows: the file that lists unusable rows.
    preferences: None for rows without preferences.
    prompts: None for a run without rewards.
    """

    section: Section
    name: str
    path: str
    format: str
    formats: frozenset[str]
    weight: float
    bad_rows: str
    figures: Figures
    preferences: PreferenceFigures | None = None
    prompts: PromptFigures | None = None


@dataclass(frozen=True)
class Order:
    """An epoch in training order; `fill` is the packing efficiency, None without packing."""

    sequences: int
    tokens: int
    steps: int
    fill: float | None
    total_steps: int


@dataclass(frozen=True)
class Report:
    """The report of `finetune data`; `ends` holds (a turn | a document, the token that ends it)."""

    name: str
    model: str
    max_length: int
    truncation: str
    template: str
    ends: tuple[tuple[str, str], ...]
    parts: tuple[PartReport, ...]
    training: Figures
    order: Order
    preferences: PreferenceFigures | None = None
    prompts: PromptFigures | None = None


def parts_of(data: LoadedData, held_out: float) -> list[Part]:
    """Return the rows of data.train, of data.eval, and those held out by data.held_out, before truncation."""
    parts = [Part("train", s, np.flatnonzero(~is_held_out(s.store.hashes, held_out))) for s in data.train]
    # With data.held_out, the last items of data.eval are the held-out rows of each training source.
    given = len(data.eval) - (len(data.train) if held_out else 0)
    parts += [Part("eval", source, np.arange(len(source.store))) for source in data.eval[:given]]
    held = data.eval[given:]
    return parts + [Part("held out", s, np.flatnonzero(is_held_out(s.store.hashes, held_out))) for s in held]


def build_report(data: LoadedData, cfg: RunConfig, chat: ChatTemplate) -> Report:
    """Compute all statistics of a run's data."""
    parts = parts_of(data, cfg.data.held_out)
    trained = [part for part in parts if part.section == "train"]
    reports = [
        PartReport(
            part.section,
            part.source.name,
            part.source.config.path,
            part.source.store.meta.format(),
            frozenset(part.source.store.meta.formats),
            part.source.config.weight,
            str(part.source.store.bad_rows),
            _figures([part], [other.source for other in trained if other is not part], cfg),
            preference_figures([part.source], chat),
            prompt_figures([part.source], cfg, chat),
        )
        for part in parts
    ]
    formats = frozenset().union(*(report.formats for report in reports))
    ends = [("a turn", chat.turn_end_id)] if formats - UNTEMPLATED else []
    ends += [("a document", chat.end_of_text_id)] if "text" in formats else []
    return Report(
        name=cfg.name,
        model=cfg.model.name,
        max_length=cfg.data.max_length,
        truncation=cfg.data.truncation,
        template=cfg.data.chat_template or "the tokenizer's own",
        ends=tuple((what, chat.token_of(token) or "nothing") for what, token in ends),
        parts=tuple(reports),
        training=_figures(trained, [], cfg),
        order=_order(data, cfg),
        preferences=preference_figures([part.source for part in trained], chat),
        prompts=prompt_figures([part.source for part in trained], cfg, chat),
    )


def _figures(parts: Sequence[Part], others: Sequence[Source], cfg: RunConfig) -> Figures:
    """Compute the statistics of the rows [R] of all parts, one part after another. others: see Figures.shared."""
    limit, sources = cfg.data.max_length, [part.source for part in parts]
    lengths_R = np.concatenate([part.source.store.lengths[part.rows] for part in parts])
    spelled_R = np.concatenate([part.source.store.control_tokens[part.rows] for part in parts])
    hashes = np.concatenate([source.store.hashes[source.rows] for source in sources])
    shared = [(other.name, int(np.isin(hashes, other.store.hashes[other.rows]).sum())) for other in others]

    def place(index: int) -> str:
        for part in parts:
            if index < len(part.rows):
                return part.source.store.location(int(part.rows[index]))
            index -= len(part.rows)
        raise IndexError(index)

    shortest, longest = int(lengths_R.argmin()), int(lengths_R.argmax())
    median, most = np.percentile(lengths_R, [50, 95], method="inverted_cdf")
    return Figures(
        rows=len(lengths_R),
        tokens=int(lengths_R.sum()),
        targets=sum(int(part.source.store.targets[part.rows].sum()) for part in parts),
        lengths=Lengths(
            length_bins(lengths_R, limit),
            Extreme(int(lengths_R[shortest]), place(shortest)),
            Extreme(int(lengths_R[longest]), place(longest)),
            int(median),
            int(most),
        ),
        documents=sum(len(source.documents) for source in sources),
        kept_tokens=sum(int(source.documents.lengths.sum()) for source in sources),
        too_long=int((lengths_R > limit).sum()),
        left_out=sum((_left_out(part, cfg) for part in parts), Counter()),
        duplicates=len(hashes) - len(np.unique(hashes)),
        shared=tuple((name, rows) for name, rows in shared if rows),
        control_tokens=int(spelled_R.sum()),
        control_rows=int((spelled_R > 0).sum()),
        control_place=place(int(np.flatnonzero(spelled_R)[0])) if spelled_R.any() else "",
        media=_media(parts),
    )


def _media(parts: Sequence[Part]) -> tuple[MediaFigures, ...]:
    tokens: dict[str, list[int]] = {}
    for part in parts:
        store = part.source.store
        for row in part.rows[store.has_media[part.rows]]:
            placed = store.placed(int(row))
            for item in () if placed is None else placed.items:
                tokens.setdefault(item.kind, []).append(item.tokens)
    return tuple(MediaFigures(kind, len(each), sum(each), max(each)) for kind, each in sorted(tokens.items()))


def _left_out(part: Part, cfg: RunConfig) -> Counter[str]:
    """Count the rows that give no document; a row that is short enough always gives one."""
    why = f"longer than {cfg.data.max_length:,} tokens"
    if cfg.data.truncation != "drop":
        why = f"no target left within {cfg.data.max_length:,} tokens"
    # Bad rows have no hash to be held out by.
    bad = 0 if part.section == "held out" else part.source.store.meta.bad_rows
    return +Counter({"bad rows": bad, why: len(part.rows) - len(part.source.rows)})


def length_bins(lengths: np.ndarray, limit: int) -> tuple[Bin, ...]:
    """Count lengths [N] (at least one) in bins with borders 2, 3, 4, 6, 8, 12, … tokens and `limit`."""
    powers = 2 ** np.arange(int(lengths.max()).bit_length() + 1)
    lasts = np.union1d(powers, powers[1:] * 3 // 2)
    lasts = np.union1d(lasts[(lasts < 0.8 * limit) | (lasts > 1.25 * limit)], [limit])
    places = np.searchsorted(lasts, lengths)
    rows = np.bincount(places)
    firsts = np.concatenate([[1], lasts[:-1] + 1])
    occupied = range(int(places.min()), int(places.max()) + 1)
    return tuple(Bin(int(firsts[i]), int(lasts[i]), int(rows[i])) for i in occupied)


def _order(data: LoadedData, cfg: RunConfig) -> Order:
    # With rewards, a sequence is a prompt: its answers do not exist yet. Several steps may use the same answers.
    rewarded = cfg.reward.loss != "none"
    capacity = cfg.data.max_length if cfg.data.packing and not rewarded else None
    steps_of_a_batch = cfg.reward.updates if rewarded else 1
    kept = leave_room(data.documents, cfg)
    lengths, weights = data.documents.lengths[kept], data.weights[kept]
    order = SequenceOrder(lengths, weights, capacity, cfg.train.batch_size, cfg.train.seed)
    sequences = order.epoch(0)
    tokens = int(sum(lengths[sequence].sum() for sequence in sequences))
    return Order(
        sequences=len(sequences),
        tokens=tokens,
        steps=order.steps_in(0) * steps_of_a_batch,
        fill=tokens / (len(sequences) * capacity) if capacity and sequences else None,
        total_steps=cfg.train.max_steps or order.steps_for(cfg.train.epochs or 1) * steps_of_a_batch,
    )
