"""Which documents share a sequence, and in which order sequences come: pure functions of (seed, epoch, step).

Nothing here holds state, so a resumed run skips nothing and a run on other ranks sees the same batches.
Packing is our own: TRL's `pack_dataset` copies the data itself and cannot be repeated per epoch from a seed; here only
lengths are looked at. Both are best-fit decreasing and fill the same number of packs.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np


def pack_best_fit(lengths: np.ndarray, capacity: int, order: np.ndarray) -> list[list[int]]:
    """Best-fit decreasing: each document goes, longest first, where it leaves the least room.

    lengths: tokens a document, each at most `capacity`. order: the documents to pack, by index, repeats allowed; among
    documents of one length the given order decides.
    Returns: bins of document indices. O(n log n + n · capacity / 1000) for n documents: rooms are looked up among those
    that occur, at most `capacity` of them.
    Source: Johnson 1974, the 11/9 bound of best-fit decreasing.
    """
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    bins: list[list[int]] = []
    rooms: list[int] = []  # room left in some bin, ascending, each once
    with_room: dict[int, list[int]] = {}  # the bins that have it
    for document, need in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fit = bisect.bisect_left(rooms, need)
        if fit < len(rooms):
            room = rooms[fit]
            index = with_room[room].pop()
            bins[index].append(document)
            if not with_room[room]:
                del with_room[room], rooms[fit]
        else:
            room, index = capacity, len(bins)
            bins.append([document])
        if left := room - need:
            if left not in with_room:
                bisect.insort(rooms, left)
                with_room[left] = []
            with_room[left].append(index)
    return bins


class SequenceOrder:
    """The sequences of every step of a run.

    lengths [N]: tokens a document. weights [N]: copies of a document an epoch holds; 2.5 means two, and a third
    for half of the documents, drawn anew each epoch. capacity: tokens a packed sequence holds, None to keep documents
    apart. batch_size: sequences a step; the last step of an epoch may hold fewer.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        weights: Sequence[float] | np.ndarray,
        capacity: int | None,
        batch_size: int,
        seed: int,
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
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
        bins = pack_best_fit(self.lengths, self.capacity, order)
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


def split_among_ranks(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of a step's sequences each rank computes, with token counts as equal as whole sequences allow.

    tokens: length of each sequence. The longest sequence left goes to the rank with the fewest tokens.
    Returns: indices for each rank, ascending.
    Source: Graham 1969, the 4/3 bound of longest processing time first.
    """
    load = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        rank = load.index(min(load))
        load[rank] += tokens[i]
        shares[rank].append(i)
    return [sorted(share) for share in shares]
