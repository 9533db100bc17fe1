"""Samplers: the packed documents of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from finetune.data.documents import Document
from finetune.data.packing import SequenceOrder


class Sampler(Protocol):
    """The order of the training documents: a pure function of the step, without state to save."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides the order and the tokens."""
        ...

    def step_batches(self, step: int) -> list[list[Document]]:
        """Return the packed sequences of a step (from 0), of all ranks."""
        ...

    def steps_for(self, epochs: float) -> int:
        """Return the optimizer steps of `epochs` passes over the rows."""
        ...

    def close(self) -> None:
        """Stop background work."""
        ...


@dataclass(frozen=True)
class MapSampler:
    """Samples documents that are all available before the first step."""

    documents: Sequence[Document]
    order: SequenceOrder
    digest: str = ""

    def step_batches(self, step: int) -> list[list[Document]]:
        return [[self.documents[i] for i in sequence] for sequence in self.order.batch(step)]

    def steps_for(self, epochs: float) -> int:
        return self.order.steps_for(epochs)

    def close(self) -> None:
        """Do nothing: there is no background work."""
