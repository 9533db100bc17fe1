"""What a step consumes: documents laid end to end, each attending to itself alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune.data.template.chat import UNTRAINED


@dataclass(frozen=True, slots=True)
class Document:
    """One row, or a piece of one, as tokens.

    ids [T] int32; labels [T] int32: labels[t] is the token to predict from position t (already shifted), or UNTRAINED.
    place: `file:row`, for messages to the user. weights [T] float32: what the loss at a position is multiplied by;
    None is 1 everywhere. row: the row in its source, from 0.
    """

    ids: np.ndarray
    labels: np.ndarray
    place: str
    weights: np.ndarray | None = None
    row: int = 0

    @property
    def target_tokens(self) -> int:
        return int((self.labels != UNTRAINED).sum())

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents packed into one row.

    input_ids, position_ids, labels: [1, T] int64; positions restart at 0 in every document; labels are shifted.
    segment_lengths: documents' lengths, summing to T. weights [1, T] float32 of the targets; None is 1 everywhere.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    segment_lengths: tuple[int, ...]
    places: tuple[str, ...]
    weights: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> Batch:
        ids, positions, labels = (
            x.to(device, non_blocking=True) for x in (self.input_ids, self.position_ids, self.labels)
        )
        weights = None if self.weights is None else self.weights.to(device, non_blocking=True)
        return Batch(ids, positions, labels, self.segment_lengths, self.places, weights)


def build_batch(documents: Sequence[Document]) -> Batch:
    """Lay documents end to end; the order is kept."""

    def row(parts: list[np.ndarray], dtype: type = np.int64) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(dtype))[None]

    weighted = any(d.weights is not None for d in documents)
    weights = [np.ones(len(d), np.float32) if d.weights is None else d.weights for d in documents] if weighted else []
    return Batch(
        input_ids=row([d.ids for d in documents]),
        position_ids=row([np.arange(len(d)) for d in documents]),
        labels=row([d.labels for d in documents]),
        segment_lengths=tuple(len(d) for d in documents),
        places=tuple(d.place for d in documents),
        weights=row(weights, np.float32) if weighted else None,
    )


def silent_batch(document: Document) -> Batch:
    """A batch without a target: a rank that has no document left runs it, so that no rank waits for it."""
    silent = Document(document.ids[:1], np.full(1, UNTRAINED, dtype=np.int32), document.place)
    return build_batch([silent])
