"""What the loop asks for: the documents of a step, already packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from finetune.data.documents import Document
from finetune.data.packing import SequenceOrder


class Sampler(Protocol):
    """The training documents in their order, a pure function of the step: nothing to save, nothing to resume."""

    @property
    def digest(self) -> str:
        """SHA-256 of what decides that order and the tokens."""
        ...

    def step_batches(self, step: int) -> list[list[Document]]:
        """Packed sequences of a step (from 0), over all ranks."""
        ...

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps that so many passes over the rows take."""
        ...

    def close(self) -> None:
        """Let go of what works in the background."""
        ...


@dataclass(frozen=True)
class MapSampler:
    """Documents that are all at hand before the first step."""

    documents: Sequence[Document]
    order: SequenceOrder
    digest: str = ""

    def step_batches(self, step: int) -> list[list[Document]]:
        return [[self.documents[i] for i in sequence] for sequence in self.order.batch(step)]

    def steps_for(self, epochs: float) -> int:
        return self.order.steps_for(epochs)

    def close(self) -> None:
        """Nothing works in the background."""
