"""Measure the KL that storing one linear layer in fewer bits costs, for each layer alone.

A change leaves everything before its layer as it is. Those states are computed once, and each change only from its
layer on: half of the work of whole passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from finetune.data.batch import Batch
from finetune.losses.hidden_states import DecoderRows
from finetune.mixed_precision.divergences import MeanKl, divergences, mean_kl
from finetune.mixed_precision.layerwise import LayerwiseModel

ALL = "*"  # stands for a layer's name: all linear layers at once


@dataclass(frozen=True, slots=True)
class Measured:
    """The KL when the linear layer `name` alone is stored as `kind`."""

    name: str
    kind: str
    mean: MeanKl


# (work done, total work), in passes of all rows through one layer.
Progress = Callable[[int, int], None]


class Sensitivity:
    """A measurement of a model on some rows."""

    def __init__(self, model: LayerwiseModel, batches: Sequence[Batch], progress: Progress = lambda done, total: None):
        self.model, self.batches = model, batches
        self._progress = progress
        self._done = self._total = 0

    def measure(self, kinds: Sequence[str], known: Collection[tuple[str, str]] = ()) -> Iterator[Measured]:
        """Yield each measurement as soon as it is made: all layers at once first, then each layer alone.

        Args:
            kinds: 4-bit kinds and int8.
            known: (name, kind) of the measurements to leave out.
        """
        layers = self.model.layers
        uniform = [kind for kind in kinds if (ALL, kind) not in known]
        changes = [
            [(name, kind) for name in self.model.linears_of(index) for kind in kinds if (name, kind) not in known]
            for index in range(layers)
        ]
        if not uniform and not any(changes):
            return
        self._total = layers * (1 + len(uniform))
        if any(changes):
            self._total += sum(1 + len(some) * (layers - index) for index, some in enumerate(changes))
        reference = self._run({})
        for kind in uniform:
            yield Measured(ALL, kind, self._mean(reference, [self._run(dict.fromkeys(self.model.linears, kind))])[0])
        if any(changes):
            yield from self._measure_single(changes, reference)

    def _measure_single(
        self, changes: Sequence[Sequence[tuple[str, str]]], reference: list[Tensor]
    ) -> Iterator[Measured]:
        rows = [self.model.enter(batch) for batch in self.batches]
        states = [each.states for each in rows]
        for index, here in enumerate(changes):
            self.model.load(index, {})
            changed = []
            for name, kind in here:
                with self.model.stored(name, kind):
                    changed.append(self._advance(rows, states))
            states = self._advance(rows, states)
            for later in range(index + 1, self.model.layers) if here else ():
                self.model.load(later, {})
                changed = [self._advance(rows, each) for each in changed]
            hidden = [[self.model.leave(*p) for p in zip(each, self.batches, strict=True)] for each in changed]
            for (name, kind), mean in zip(here, self._mean(reference, hidden), strict=True):
                yield Measured(name, kind, mean)

    def _advance(self, rows: Sequence[DecoderRows], states: Sequence[Tensor]) -> list[Tensor]:
        after = [self.model.advance(*pair) for pair in zip(rows, states, strict=True)]
        self._count(1)
        return after

    def _run(self, storage: dict[str, str]) -> list[Tensor]:
        hidden = self.model.run(self.batches, storage)
        self._count(self.model.layers)
        return hidden

    def _count(self, passes: int) -> None:
        self._done += passes
        self._progress(self._done, self._total)

    def _mean(self, reference: Sequence[Tensor], changed: Sequence[Sequence[Tensor]]) -> list[MeanKl]:
        """Average for each changed model; both arguments hold states [N, D] of each batch's targets."""
        head, vocabulary = self.model.head, self.model.head.out_features
        nats = [
            divergences(reference_ND, [each[number] for each in changed], head, vocabulary)
            for number, reference_ND in enumerate(reference)
        ]
        return [mean_kl([nats_CN[row] for nats_CN in nats], self.batches) for row in range(len(changed))]
