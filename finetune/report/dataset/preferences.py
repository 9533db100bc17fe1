"""Compute statistics of pairs and of answers with a label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.formats.preferences import EQUAL_SIDES
from finetune.data.loader import Source
from finetune.data.template.chat import ChatTemplate

# The last word of an answer has other tokens where the text goes on; few words have more tokens than this.
_WORD_TOKENS = 6


@dataclass(frozen=True)
class PreferenceFigures:
    """Statistics of rows with preferences, as they are used.

    Attributes:
        pairs: rows with both answers.
        equal: pairs that were refused because both answers are equal.
        prefixes: pairs with one answer that begins with the other, apart from white space at the end.
        chosen_longer: pairs whose chosen answer has more tokens.
        good, bad: answers of either kind, in pairs and alone.
        good_tokens, bad_tokens: of these answers, in all; with the end token.
    """

    pairs: int
    equal: int
    prefixes: int
    chosen_longer: int
    good: int
    bad: int
    good_tokens: int
    bad_tokens: int

    @property
    def chosen_longer_share(self) -> float:
        return self.chosen_longer / self.pairs if self.pairs else 0.0

    @property
    def mean_tokens(self) -> tuple[float, float]:
        """The mean number of tokens of a good and of a bad answer."""
        return self.good_tokens / max(1, self.good), self.bad_tokens / max(1, self.bad)


def preference_figures(sources: Sequence[Source], chat: ChatTemplate) -> PreferenceFigures | None:
    """Compute the statistics of all documents of some sources; None if no row has a preference."""
    lengths: list[tuple[int, int]] = []
    prefixes = 0
    for documents in (source.documents for source in sources):
        for _, _, piece in map(documents.piece, range(len(documents))):
            if piece.chosen_tokens is None:
                continue
            good, bad = (piece.ids[part][piece.trained[part]] for part in piece.sides)
            lengths.append((len(good), len(bad)))
            prefixes += bool(len(good) and len(bad)) and _is_prefix(good, bad, chat)
    if not lengths:
        return None
    good_R, bad_R = np.array(lengths).T
    return PreferenceFigures(
        pairs=int(((good_R > 0) & (bad_R > 0)).sum()),
        equal=sum(map(_equal_pairs, sources)),
        prefixes=prefixes,
        chosen_longer=int(((good_R > bad_R) & (bad_R > 0)).sum()),
        good=int((good_R > 0).sum()),
        bad=int((bad_R > 0).sum()),
        good_tokens=int(good_R.sum()),
        bad_tokens=int(bad_R.sum()),
    )


def _is_prefix(one: np.ndarray, other: np.ndarray, chat: ChatTemplate) -> bool:
    """Return whether one answer begins with the other, apart from white space and end token."""
    shorter, longer = sorted((one, other), key=len)
    # Decoding is slow, and most answers differ before their last word.
    sure = max(0, len(shorter) - _WORD_TOKENS)
    if not np.array_equal(shorter[:sure], longer[:sure]):
        return False
    texts = sorted((chat.decode(ids).rstrip() for ids in (one, other)), key=len)
    return texts[1].startswith(texts[0])


def _equal_pairs(source: Source) -> int:
    # The held-out rows of a source have the store of its training rows.
    if source.held_out or not source.store.meta.bad_rows:
        return 0
    with source.store.bad_rows.open(encoding="utf-8") as lines:
        return sum(json.loads(line)["reason"].endswith(EQUAL_SIDES) for line in lines)


def describe_preferences(figures: PreferenceFigures) -> dict[str, str]:
    """Describe pairs and answers, by subject."""
    good, bad = figures.mean_tokens
    facts = {}
    if figures.pairs:
        equal = f"; {figures.equal:,} equal pairs left out" if figures.equal else ""
        prefixes = f"; in {figures.prefixes:,} one answer begins with the other" if figures.prefixes else ""
        facts["pairs"] = f"{figures.pairs:,}; the chosen answer is longer in {figures.chosen_longer_share:.0%}"
        facts["pairs"] += prefixes + equal
    if figures.good != figures.pairs or figures.bad != figures.pairs:
        facts["labels"] = f"{figures.good:,} good answers, {figures.bad:,} bad answers"
    names = ("chosen", "rejected") if "labels" not in facts else ("good", "bad")
    facts["answers"] = f"mean tokens: {names[0]} {good:.1f}, {names[1]} {bad:.1f}"
    return facts
