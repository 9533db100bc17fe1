"""What each linear layer costs when it alone is stored otherwise; or what it is worth when it alone is kept.

A layer's change leaves everything before it as it is, so those states are computed once, and each change only from its
layer on: half of the work of whole passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from finetune.data.batch import Batch
from finetune.losses.hidden_states import DecoderRows
from finetune.mixed_precision.divergences import MeanKl, divergences, mean_kl
from finetune.mixed_precision.layerwise import LayerwiseModel

Mode = Literal["only", "keep"]
ALL = "*"  # in the place of a name: every linear layer at once


@dataclass(frozen=True, slots=True)
class Measured:
    """only: the linear `name` alone is stored as `kind`. keep: it alone is in 16 bit, all others are stored so."""

    name: str
    kind: str
    mean: MeanKl


# (work done, work in all), in passes of all rows through one layer.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Change:
    """A linear stored as `as_kind`, on the way to what is known as (name, kind)."""

    name: str
    kind: str
    as_kind: str


class Sensitivity:
    """One measurement of a model on some rows."""

    def __init__(self, model: LayerwiseModel, batches: Sequence[Batch], progress: Progress = lambda done, total: None):
        self.model, self.batches = model, batches
        self._vocabulary = model.head.out_features
        self._progress = progress
        self._done = self._total = 0

    def measure(self, kinds: Sequence[str], mode: Mode, known: Collection[tuple[str, str]] = ()) -> Iterator[Measured]:
        """Everything but what is known already, by (name, kind), as it is found: first all layers at once of each kind.

        kinds: 4-bit ones and int8.
        """
        passes = self._passes(kinds, mode, known)
        uniform = [kind for kind in kinds if (ALL, kind) not in known]
        layers = self.model.layers
        self._total = layers * (1 + len(uniform)) + sum(
            (1 + len(changes) * (layers - index)) for _, by_layer in passes for index, changes in by_layer.items()
        )
        if not uniform and not passes:
            return
        reference = self._run({})
        for kind in uniform:
            yield Measured(ALL, kind, self._mean(reference, [self._run(dict.fromkeys(self.model.linears, kind))])[0])
        for background, by_layer in passes:
            yield from self._pass(background, by_layer, reference)

    def _passes(
        self, kinds: Sequence[str], mode: Mode, known: Collection[tuple[str, str]]
    ) -> list[tuple[dict[str, str], dict[int, list[_Change]]]]:
        """Changes by layer, with what all other linears are stored as."""
        groups = [list(kinds)] if mode == "only" else [[kind] for kind in kinds]
        passes = []
        for group in groups:
            background = {} if mode == "only" else dict.fromkeys(self.model.linears, group[0])
            by_layer = {
                index: [
                    _Change(name, kind, kind if mode == "only" else "none")
                    for name in self.model.linears_of(index)
                    for kind in group
                    if (name, kind) not in known
                ]
                for index in range(self.model.layers)
            }
            if any(by_layer.values()):
                passes.append((background, by_layer))
        return passes

    def _pass(
        self, background: dict[str, str], by_layer: dict[int, list[_Change]], reference: list[Tensor]
    ) -> Iterator[Measured]:
        rows = [self.model.enter(batch) for batch in self.batches]
        states = [each.states for each in rows]
        for index, changes in by_layer.items():
            self.model.load(index, background)
            changed = []
            for change in changes:
                with self.model.stored(change.name, change.as_kind):
                    changed.append(self._advance(rows, states))
            states = self._advance(rows, states)
            for later in range(index + 1, self.model.layers) if changes else ():
                self.model.load(later, background)
                changed = [self._advance(rows, each) for each in changed]
            hidden = [[self.model.leave(*p) for p in zip(each, self.batches, strict=True)] for each in changed]
            for change, mean in zip(changes, self._mean(reference, hidden), strict=True):
                yield Measured(change.name, change.kind, mean)

    def _advance(self, rows: Sequence[DecoderRows], states: Sequence[Tensor]) -> list[Tensor]:
        after = [self.model.advance(*pair) for pair in zip(rows, states, strict=True)]
        self._done += 1
        self._progress(self._done, self._total)
        return after

    def _run(self, storage: dict[str, str]) -> list[Tensor]:
        hidden = self.model.run(self.batches, storage)
        self._done += self.model.layers
        self._progress(self._done, self._total)
        return hidden

    def _mean(self, reference: Sequence[Tensor], changed: Sequence[Sequence[Tensor]]) -> list[MeanKl]:
        """Of each changed model. reference: states [N, D] of each batch's targets; changed: the same of each model."""
        nats = [
            divergences(reference_ND, [each[number] for each in changed], self.model.head, self._vocabulary)
            for number, reference_ND in enumerate(reference)
        ]
        return [mean_kl([nats_CN[row] for nats_CN in nats], self.batches) for row in range(len(changed))]
