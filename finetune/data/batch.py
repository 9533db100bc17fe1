"""Batches: documents laid end to end; each attends only to itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.media.media import Media
from finetune.data.positions import AXES

# Sharing repays its cost up to this ratio of rows to tokens.
_SHARED_FROM = 0.97


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents packed into one sequence of T tokens, on the CPU.

    input_ids, labels: [1, T] int64; labels are shifted.
    position_ids: [1, T] int64, or [3, T] (time, height, width) if a document has media. They restart at 0 in each
        document.
    segment_lengths: length of each document, summing to T.
    locations: of each document, for messages.
    row_of_token: [T] int64, the row of the forward pass that computes each token. Documents with equal prefixes and
        equal media may share rows, since the hidden states are equal.
    media_digests: of each document.
    media: of all documents, in the order of the tokens. media_tokens: [M] int64, those that hold their embeddings.
    weights: [1, T] float32, of the targets; None is 1 everywhere.
    student_generated: [T] bool, tokens of documents that the model in training wrote; None if there are none.
    sides: of rows with preferences, the numbers of the documents with the desirable and the undesirable answer, -1 for
        none. Empty for other rows.
    advantages: [A] float32, of the documents, and sampled_log_probs: [N] float32, of the targets, of answers that the
        model sampled; None for other documents.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    segment_lengths: tuple[int, ...]
    locations: tuple[str, ...]
    row_of_token: Tensor
    media_digests: tuple[bytes, ...]
    media: tuple[Media, ...] = ()
    media_tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    weights: Tensor | None = None
    student_generated: Tensor | None = None
    sides: tuple[tuple[int, int], ...] = ()
    advantages: Tensor | None = None
    sampled_log_probs: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def rows(self) -> int:
        return int(self.row_of_token.max()) + 1

    @property
    def targets(self) -> Tensor:
        """The tokens [N] int64 that carry a target."""
        return (self.labels[0] != IGNORE_INDEX).nonzero().squeeze(1)

    @property
    def target_counts(self) -> Tensor:
        """The number of targets of each document [A] int64."""
        ends = torch.tensor(self.segment_lengths).cumsum(0)
        targets_before = F.pad((self.labels[0] != IGNORE_INDEX).cumsum(0), (1, 0))
        return targets_before[F.pad(ends, (1, 0))].diff()


def build_batch(documents: Sequence[Document], *, share_prefixes: bool = False) -> Batch:
    """Lay documents end to end, in their order; a row with preferences becomes a document for each of its sides.

    share_prefixes: skip tokens after the last target, and compute equal prefixes once where it saves work. Loss and
        gradients stay the same.
    """
    documents, sides = _split_sides(documents)
    if share_prefixes:
        documents = [_up_to_last_target(document) for document in documents]

    def row(parts: list[np.ndarray], dtype: type = np.int64) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(dtype))[None]

    weighted = any(d.weights is not None for d in documents)
    judged = [d.judged for d in documents if d.judged is not None]
    weights = [np.ones(len(d), np.float32) if d.weights is None else d.weights for d in documents] if weighted else []
    return Batch(
        input_ids=row([d.ids for d in documents]),
        position_ids=_positions(documents),
        labels=row([d.labels for d in documents]),
        segment_lengths=tuple(len(d) for d in documents),
        locations=tuple(d.location for d in documents),
        row_of_token=torch.from_numpy(assign_rows(documents, share_prefixes)),
        media_digests=tuple(d.media_digest for d in documents),
        media=tuple(item for d in documents for item in d.media),
        media_tokens=_media_tokens(documents),
        weights=row(weights, np.float32) if weighted else None,
        student_generated=row([np.full(len(d), d.student_generated) for d in documents], np.bool_)[0]
        if any(d.student_generated for d in documents)
        else None,
        sides=sides,
        advantages=torch.tensor([each.advantage for each in judged]) if judged else None,
        sampled_log_probs=torch.from_numpy(np.concatenate([each.log_probs for each in judged])) if judged else None,
    )


def _split_sides(documents: Sequence[Document]) -> tuple[list[Document], tuple[tuple[int, int], ...]]:
    """Return the documents of all rows, and `Batch.sides`."""
    if all(document.chosen_tokens is None for document in documents):
        return list(documents), ()
    split: list[Document] = []
    numbers = []
    for document in documents:
        pair = []
        for side in document.sides:
            pair.append(-1 if side is None else len(split))
            split += [] if side is None else [side]
        numbers.append((pair[0], pair[1]))
    return split, tuple(numbers)


def _up_to_last_target(document: Document) -> Document:
    targets = np.flatnonzero(document.labels != IGNORE_INDEX)
    return document.cut(slice(0, int(targets[-1]) + 1 if len(targets) else 1))


def _positions(documents: Sequence[Document]) -> Tensor:
    """Return `Batch.position_ids`."""
    axes = AXES if any(document.placed for document in documents) else 1
    texts = (np.broadcast_to(np.arange(len(document)), (axes, len(document))) for document in documents)
    parts = [d.placed.positions(len(d)) if d.placed else text for d, text in zip(documents, texts, strict=True)]
    return torch.from_numpy(np.concatenate(parts, axis=1))


def _media_tokens(documents: Sequence[Document]) -> Tensor:
    starts = np.cumsum([0, *map(len, documents)])
    parts = [d.placed.tokens() + start for d, start in zip(documents, starts, strict=False) if d.placed]
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))


def assign_rows(documents: Sequence[Document], share_prefixes: bool = True) -> np.ndarray:
    """Return the row [T] int64 that computes each token of documents laid end to end.

    Equal prefixes of documents with equal media get the same rows. Rows are numbered by their first token. Without
    enough equal prefixes to repay the gathering of keys and values, every token gets its own row: 0 … T - 1.
    """
    lengths = [len(document) for document in documents]
    starts, tokens = np.cumsum([0, *lengths]), sum(lengths)
    rows = np.arange(tokens)
    if not share_prefixes or len(documents) < 2:
        return rows

    # In sorted order, a document shares with its neighbor all that it shares with any document before it.
    keys = [(document.media_digest, document.ids.astype(">i4").tobytes()) for document in documents]
    for before, after in itertools.pairwise(sorted(range(len(documents)), key=keys.__getitem__)):
        first, second = documents[before], documents[after]
        if first.media_digest != second.media_digest:
            continue
        shorter = min(lengths[before], lengths[after])
        differs = np.flatnonzero(first.ids[:shorter] != second.ids[:shorter])
        common = int(differs[0]) if len(differs) else shorter
        rows[starts[after] : starts[after] + common] = rows[starts[before] : starts[before] + common]
    _, first_use, row_of_token = np.unique(rows, return_index=True, return_inverse=True)
    if len(first_use) > _SHARED_FROM * tokens:
        return np.arange(tokens)
    # A shared row may carry the number of a token that is not its first: number rows by their first token.
    seen = np.full(len(first_use), tokens)
    np.minimum.at(seen, row_of_token, np.arange(tokens))
    return np.argsort(np.argsort(seen))[row_of_token]


def groups_of(documents: Iterable[Document], limit_tokens: int) -> Iterator[list[Document]]:
    """Yield consecutive groups of documents of at most `limit_tokens`; a longer document is a group of its own."""
    group: list[Document] = []
    tokens = 0
    for document in documents:
        if group and tokens + len(document) > limit_tokens:
            yield group
            group, tokens = [], 0
        group.append(document)
        tokens += len(document)
    if group:
        yield group


def dummy_batch(document: Document) -> Batch:
    """Build a batch without a target, for a rank without documents: all ranks must run the same passes."""
    dummy = Document(document.ids[:1], np.full(1, IGNORE_INDEX, dtype=np.int32), document.location)
    return build_batch([dummy])
