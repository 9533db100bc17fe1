"""The documents that a run trains on or is measured by: pieces of stored rows, made when they are asked for."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from finetune.config.schema import DataConfig
from finetune.data.encoded import IGNORE_INDEX, Encoded
from finetune.data.tokens.store import TokenStore


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens and labels of one row, or of a piece of it.

    ids: [T] int32.
    labels: [T] int32, already shifted: labels[t] is the token to predict from position t, or IGNORE_INDEX.
    location: `file:line`, for messages to the user.
    weights: [T] float32, factor of the loss at each position; None is 1 everywhere.
    row: index in its source, from 0.
    student_generated: the model in training wrote the targets, so only a teacher can judge them.
    media_digest: hash of the images, audio and video behind placeholder tokens; empty for text. Documents with equal
        ids and different media have different hidden states.
    """

    ids: np.ndarray
    labels: np.ndarray
    location: str
    weights: np.ndarray | None = None
    row: int = 0
    student_generated: bool = False
    media_digest: bytes = b""

    @property
    def target_tokens(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Documents(Sequence[Document]):
    """Documents of one or several stores. All arrays are [M] int64.

    stores: where the tokens lie. source: the store a document is of; rows: its row there; starts, lengths: the piece of
    that row, in tokens; targets: tokens predicted in the piece.
    """

    stores: tuple[TokenStore, ...]
    source: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Document: ...
    @overload
    def __getitem__(self, i: slice) -> Documents: ...
    def __getitem__(self, i: int | slice) -> Document | Documents:
        if isinstance(i, slice):
            return self.select(np.arange(len(self))[i])
        store, row = self.stores[self.source[i]], int(self.rows[i])
        piece = store.piece(row, int(self.starts[i]), int(self.lengths[i]))
        labels, weights = _shifted(piece)
        return Document(
            piece.ids,
            labels,
            store.location(row),
            weights,
            row=int(store.indices[row]),
            media_digest=piece.media_digest,
        )

    def select(self, which: np.ndarray) -> Documents:
        """The documents with these indices (or where this mask is true), in that order."""
        arrays = (self.source, self.rows, self.starts, self.lengths, self.targets)
        return Documents(self.stores, *(array[which] for array in arrays))

    @staticmethod
    def join(parts: Iterable[Documents]) -> Documents:
        """The documents of all parts, one part after another."""
        parts = list(parts)
        first_store = np.cumsum([0, *(len(part.stores) for part in parts)])
        columns = zip(
            *(
                (p.source + first, p.rows, p.starts, p.lengths, p.targets)
                for p, first in zip(parts, first_store[:-1], strict=True)
            ),
            strict=True,
        )
        return Documents(tuple(store for part in parts for store in part.stores), *map(np.concatenate, columns))

    def digest(self) -> str:
        """SHA-256 over tokens, loss weights and order, the same wherever the rows lie and whatever they are called."""
        digest = hashlib.sha256()
        for store in self.stores:
            digest.update(store.meta.content.encode())
        for array in (self.source, self.rows, self.starts, self.lengths):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).data)
        return digest.hexdigest()


def _shifted(piece: Encoded) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels and their weights: position t predicts token t + 1, and nothing is predicted from the last position."""
    weights = np.zeros(len(piece.ids), dtype=np.float32)
    weights[:-1] = piece.weights[1:]
    labels = np.full(len(piece.ids), IGNORE_INDEX, dtype=np.int32)
    labels[:-1] = np.where(weights[:-1] > 0, piece.ids[1:], IGNORE_INDEX)
    return labels, None if np.isin(weights, (0, 1)).all() else weights


@dataclass(frozen=True)
class Cut:
    """What `data.max_length` leaves of a store. without_target: rows that lost all their targets, by index."""

    documents: Documents
    counts: Counter[str]
    too_long: np.ndarray
    without_target: np.ndarray


def cut_to_length(store: TokenStore, rows: np.ndarray, cfg: DataConfig) -> Cut:
    """Documents of these rows, none longer than `data.max_length`: longer ones as `data.truncation` says, counted."""
    limit = cfg.max_length
    whole = rows[store.lengths[rows] <= limit]
    too_long = rows[store.lengths[rows] > limit]
    pieces = [piece for row in too_long for piece in _pieces(int(row), int(store.lengths[row]), cfg)]
    cut = np.array(pieces, dtype=np.int64).reshape(-1, 3)
    targets = np.array([_targets(store, *piece) for piece in pieces], dtype=np.int64)
    kept = cut[targets > 0]
    rows_all = np.concatenate([whole, kept[:, 0]])
    in_order = np.argsort(rows_all, kind="stable")
    documents = Documents(
        (store,),
        np.zeros(len(rows_all), dtype=np.int64),
        rows_all,
        np.concatenate([np.zeros_like(whole), kept[:, 1]]),
        np.concatenate([store.lengths[whole], kept[:, 2]]),
        np.concatenate([store.targets[whole], targets[targets > 0]]),
    ).select(in_order)
    counts = Counter({f"longer than {limit} tokens ({cfg.truncation})": len(too_long)} if len(too_long) else {})
    lost = np.setdiff1d(np.unique(cut[:, 0]), kept[:, 0])
    if silent := len(cut) - len(kept) - len(lost):
        counts["pieces without a target left out"] = silent
    return Cut(documents, counts, too_long, lost)


def _pieces(row: int, length: int, cfg: DataConfig) -> list[tuple[int, int, int]]:
    """(row, start, length) of what is kept of a row that is too long."""
    limit = cfg.max_length
    starts = {"left": [length - limit], "right": [0], "split": range(0, length, limit)}.get(cfg.truncation, [])
    return [(row, start, min(limit, length - start)) for start in starts]


def _targets(store: TokenStore, row: int, start: int, length: int) -> int:
    return int((store.piece(row, start, length).weights[1:] > 0).sum())
