"""What the loop asks for: the documents of a step, already packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from finetune.data.batch import Document
from finetune.data.packing import SequenceOrder


class Feed(Protocol):
    """The training documents in their order, a pure function of the step: no state, nothing to resume."""

    def sequences(self, step: int) -> list[list[Document]]:
        """Packed sequences of a step (from 0), over all ranks."""
        ...


@dataclass(frozen=True)
class StoredFeed:
    """Documents that are all at hand before the first step."""

    documents: Sequence[Document]
    order: SequenceOrder

    def sequences(self, step: int) -> list[list[Document]]:
        return [[self.documents[i] for i in sequence] for sequence in self.order.batch(step)]
