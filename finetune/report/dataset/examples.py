"""Training rows as the model will see them, decoded: targets and control tokens told apart from what is only text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np

from finetune.data.documents import Documents
from finetune.data.encoded import Encoded
from finetune.report.dataset.statistics import evenly_spaced
from finetune.system.console import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
_MARKS = re.compile(f"[{OPEN}{CLOSE}]")


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of one kind, decoded. weight: of their loss, 0 where they are no targets.

    kind: `control` is one control token, `spelled` is text that looks like one.
    """

    text: str
    weight: float
    kind: Literal["text", "control", "spelled"]


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One document. tokens, targets: how many it has; cut_from: tokens of its row where that is longer, else 0."""

    source: str
    place: str
    tokens: int
    targets: int
    cut_from: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Decoder:
    """Tokens to text. control: the control tokens by id; decode: ids to text, control tokens included."""

    decode: Callable[[Sequence[int]], str]
    control: Mapping[int, str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Decoder:
        """How this tokenizer's tokens are shown."""

        def decode(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

        return cls(decode, {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special})

    def spans(self, encoded: Encoded) -> tuple[Span, ...]:
        """A row as text, cut where the loss weight or the kind changes."""
        spelled = re.compile("|".join(map(re.escape, sorted(self.control.values(), key=len, reverse=True))) or "(?!)")

        def spans() -> Iterator[Span]:
            tokens = zip(encoded.ids.tolist(), encoded.weights.tolist(), strict=True)
            for (weight, control), group in groupby(tokens, lambda token: (token[1], token[0] in self.control)):
                ids = [token for token, _ in group]
                if control:
                    yield from (Span(self.control[token], weight, "control") for token in ids)
                else:
                    yield from _told_apart(self.decode(ids), weight, spelled)

        return tuple(spans())


def _told_apart(text: str, weight: float, spelled: re.Pattern[str]) -> Iterator[Span]:
    start = 0
    for found in spelled.finditer(text):
        if found.start() > start:
            yield Span(text[start : found.start()], weight, "text")
        yield Span(found[0], weight, "spelled")
        start = found.end()
    if start < len(text):
        yield Span(text[start:], weight, "text")


def shown_rows(names: Sequence[str], documents: Documents, decoder: Decoder, count: int) -> list[ShownRow]:
    """`count` documents, evenly spaced: always the same ones of the same data.

    names: of the documents' stores.
    """
    rows = []
    for i in evenly_spaced(len(documents), count):
        store, row = documents.stores[documents.source[i]], int(documents.rows[i])
        piece = store.piece(row, int(documents.starts[i]), int(documents.lengths[i]))
        weights = np.concatenate([[0], piece.weights[1:]])  # Nothing comes before the first token to predict it from.
        cut = int(store.lengths[row]) if len(piece.ids) < store.lengths[row] else 0
        spans = decoder.spans(Encoded(piece.ids, weights))
        name = names[documents.source[i]]
        rows.append(ShownRow(name, store.location(row), len(piece.ids), int((weights > 0).sum()), cut, spans))
    return rows


def marked(spans: Sequence[Span]) -> str:
    """A row with its targets between ⟦ and ⟧, for where there are no colors.

    A loss weight that is not 1 stands after the ⟦; a backslash stands before text that looks like a mark or a control
    token.
    """
    parts = []
    for weight, run in weighted_runs(spans):
        text = "".join(map(visible, run))
        factor = "" if weight == 1 else f"{factor_of(weight)} "
        parts.append(f"{OPEN}{factor}{text}{CLOSE}" if weight else text)
    return "".join(parts)


def weighted_runs(spans: Sequence[Span]) -> list[tuple[float, list[Span]]]:
    """Neighbouring spans of one loss weight together."""
    return [(weight, list(run)) for weight, run in groupby(spans, lambda span: span.weight)]


def visible(span: Span) -> str:
    """The text of a span as it can be printed anywhere and be taken for nothing else."""
    text = printable(span.text)
    if span.kind == "text":
        return _MARKS.sub(lambda mark: f"\\{mark[0]}", text)
    return f"\\{text}" if span.kind == "spelled" else text


def factor_of(weight: float) -> str:
    """A loss weight as it is shown: ×0.5."""
    return f"×{weight:g}"
