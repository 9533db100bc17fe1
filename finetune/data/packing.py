"""Which documents share a sequence, and in which order sequences come: pure functions of (seed, epoch, step).

Nothing here holds state, so a resumed run skips nothing and a run on other ranks sees the same batches.
Packing is our own: TRL's `pack_dataset` copies the data itself and cannot be repeated per epoch from a seed; here only
lengths are looked at.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np


def pack_best_fit(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """Best-fit decreasing: each document goes, longest first, where it leaves the least room.

    lengths: tokens a document, each at most `capacity`. order: the documents to pack, by index, repeats allowed; among
    documents of one length the given order decides.
    Returns: bins of document indices. O(n log n) in the number of documents.
    Source: Johnson 1974, the 11/9 bound of best-fit decreasing.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, bin), sorted
    for document in sorted(order, key=lambda i: -lengths[i]):
        need = lengths[document]
        fit = bisect.bisect_left(open_bins, (need, -1))
        if fit < len(open_bins):
            room, index = open_bins.pop(fit)
            bins[index].append(document)
        else:
            room, index = capacity, len(bins)
            bins.append([document])
        if room > need:
            bisect.insort(open_bins, (room - need, index))
    return bins


class SequenceOrder:
    """The sequences of every step of a run.

    lengths [N]: tokens a document. weights [N]: copies of a document an epoch holds; 2.5 means two, and a third
    for half of the documents, drawn anew each epoch. capacity: tokens a packed sequence holds, None to keep documents
    apart. batch_size: sequences a step; the last step of an epoch may hold fewer.
    """

    def __init__(
        self, lengths: Sequence[int], weights: Sequence[float], capacity: int | None, batch_size: int, seed: int
    ):
        self.lengths = lengths
        self.weights = np.asarray(weights, dtype=np.float64)
        self.capacity = capacity
        self.batch_size = batch_size
        self.seed = seed
        self._epoch: tuple[int, list[list[int]]] | None = None  # the last epoch asked for
        self._steps: list[int] = []  # steps of epoch 0, 1, …, as far as asked for

    def epoch(self, epoch: int) -> list[list[int]]:
        """Sequences of one epoch in order, each a list of document indices."""
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._make_epoch(epoch))
        return self._epoch[1]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        whole = np.floor(self.weights)
        copies = (whole + (rng.random(len(whole)) < self.weights - whole)).astype(np.int64)
        order = np.repeat(np.arange(len(copies)), copies)
        rng.shuffle(order)
        if self.capacity is None:
            return [[i] for i in order.tolist()]
        bins = pack_best_fit(self.lengths, self.capacity, order.tolist())
        return [bins[i] for i in rng.permutation(len(bins))]

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps one epoch takes; at least 1."""
        while len(self._steps) <= epoch:
            self._steps.append(max(1, math.ceil(len(self.epoch(len(self._steps))) / self.batch_size)))
        return self._steps[epoch]

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps that `epochs` take, fractions rounded up."""
        whole = math.floor(epochs)
        steps = sum(self.steps_in(e) for e in range(whole))
        return steps + math.ceil((epochs - whole) * self.steps_in(whole)) if epochs > whole else steps

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step counted from 0."""
        epoch = 0
        while step >= self.steps_in(epoch):
            step -= self.steps_in(epoch)
            epoch += 1
        return epoch, step

    def batch(self, step: int) -> list[list[int]]:
        """The sequences of one step (from 0), over all ranks."""
        epoch, index = self.locate(step)
        return self.epoch(epoch)[index * self.batch_size : (index + 1) * self.batch_size]


def split_among_ranks(sequences: Sequence[list[int]], rank: int, ranks: int) -> list[list[int]]:
    """The part of a step's sequences that one rank computes; parts differ by at most one sequence."""
    return list(sequences[rank::ranks])
