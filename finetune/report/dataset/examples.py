"""Decode training examples, with targets and control tokens marked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from finetune.data.documents import Documents, evenly_spaced
from finetune.data.encoded import Encoded
from finetune.data.media.preview import preview
from finetune.system.console import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
MEDIA_OPEN, MEDIA_CLOSE = "⟨", "⟩"
_MARKS = re.compile(f"[{OPEN}{CLOSE}{MEDIA_OPEN}{MEDIA_CLOSE}]")


@dataclass(frozen=True, slots=True)
class Span:
    """Neighboring tokens of one kind and loss weight (0: not targets), decoded.

    Kind `control` is one control token, `spelled` is text that looks like one. `media` is all tokens of one file; its
    text names the file, and `picture` is a data URI, empty for audio.
    """

    text: str
    weight: float
    kind: Literal["text", "control", "spelled", "media"]
    picture: str = ""


@dataclass(frozen=True, slots=True)
class Side:
    """One text of a document; `name` says which answer of a preference it ends with, and is empty without one."""

    name: str
    tokens: int
    targets: int
    spans: tuple[Span, ...]

    @property
    def runs(self) -> list[tuple[float, list[Span]]]:
        """The spans, grouped by loss weight."""
        return weighted_runs(self.spans)


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One document; `cut_from` is the number of tokens of its row if the document is shorter, else 0."""

    source: str
    place: str
    cut_from: int
    sides: tuple[Side, ...]

    @property
    def tokens(self) -> int:
        return sum(side.tokens for side in self.sides)

    @property
    def targets(self) -> int:
        return sum(side.targets for side in self.sides)


@dataclass(frozen=True)
class Decoder:
    """Decode tokens; `control` maps ids to control tokens."""

    decode: Callable[[list[int]], Any]
    control: Mapping[int, str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Decoder:
        """Build the decoder of a tokenizer."""
        decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cls(decode, {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special})

    def spans(self, encoded: Encoded) -> tuple[Span, ...]:
        """Decode a row into spans of one loss weight and kind."""
        spelled = "|".join(map(re.escape, sorted(self.control.values(), key=len, reverse=True))) or "(?!)"
        spans: list[Span] = []
        tokens = zip(encoded.ids.tolist(), encoded.weights.tolist(), _files(encoded), strict=True)
        for (weight, file, control), group in groupby(tokens, lambda token: (*token[1:], token[0] in self.control)):
            ids = [token for token, *_ in group]
            if file >= 0:
                shown = preview(encoded.media[file])
                spans.append(Span(shown.text, weight, "media", shown.picture))
            elif control:
                spans += (Span(self.control[token], weight, "control") for token in ids)
            else:
                parts = enumerate(re.split(f"({spelled})", self.decode(ids)))
                # Every second one is what the pattern found.
                spans += (Span(text, weight, "spelled" if i % 2 else "text") for i, text in parts if text)
        return tuple(spans)


def _files(encoded: Encoded) -> list[int]:
    """Return for each token the number of the file it belongs to, -1 for text."""
    files = [-1] * len(encoded.ids)
    if encoded.placed is not None:
        for number, (media, start) in enumerate(zip(encoded.placed.items, encoded.placed.starts, strict=True)):
            files[start : start + media.tokens] = [number] * media.tokens
    return files


def shown_rows(names: Sequence[str], documents: Documents, decoder: Decoder, count: int) -> list[ShownRow]:
    """Return `count` documents, evenly spaced; `names` are those of the documents' stores."""
    rows = []
    for i in evenly_spaced(len(documents), count):
        store, row, piece = documents.piece(i)
        cut = int(store.lengths[row]) if len(piece.ids) < store.lengths[row] else 0
        rows.append(ShownRow(names[documents.source[i]], store.location(row), cut, _sides(piece, decoder)))
    return rows


def _sides(piece: Encoded, decoder: Decoder) -> tuple[Side, ...]:
    if piece.chosen_tokens is None:
        return (_side("", piece, slice(None), decoder),)
    pair = 0 < piece.chosen_tokens < len(piece.ids)
    named = zip(("chosen", "rejected") if pair else ("good", "bad"), piece.sides, strict=True)
    return tuple(_side(name, piece, part, decoder) for name, part in named if part.start < part.stop)


def _side(name: str, piece: Encoded, part: slice, decoder: Decoder) -> Side:
    ids, weights = piece.ids[part], piece.weights[part].copy()
    weights[0] = 0  # The first token has no context to predict it from.
    start, stop, _ = part.indices(len(piece.ids))
    placed = None if piece.placed is None else piece.placed.within(start, stop)
    return Side(name, len(ids), int((weights > 0).sum()), decoder.spans(Encoded(ids, weights, placed)))


def marked(spans: Sequence[Span]) -> str:
    """Format a row without colors: targets between ⟦ and ⟧, with their loss weight unless it is 1.

    A backslash precedes text that looks like a mark or a control token.
    """
    parts = []
    for weight, run in weighted_runs(spans):
        text = "".join(map(visible, run))
        factor = "" if weight == 1 else f"{factor_of(weight)} "
        parts.append(f"{OPEN}{factor}{text}{CLOSE}" if weight else text)
    return "".join(parts)


def weighted_runs(spans: Sequence[Span]) -> list[tuple[float, list[Span]]]:
    """Group neighboring spans by loss weight."""
    return [(weight, list(run)) for weight, run in groupby(spans, lambda span: span.weight)]


def visible(span: Span) -> str:
    """Return a span's text, safe to print and unambiguous."""
    text = printable(span.text)
    if span.kind == "media":
        return f"{MEDIA_OPEN}{_MARKS.sub('?', text)}{MEDIA_CLOSE}"
    if span.kind == "text":
        return _MARKS.sub(lambda mark: f"\\{mark[0]}", text)
    return f"\\{text}" if span.kind == "spelled" else text


def factor_of(weight: float) -> str:
    """Format a loss weight: ×0.5."""
    return f"×{weight:g}"
