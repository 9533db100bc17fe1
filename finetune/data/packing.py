"""Pack documents into sequences and order them, as pure functions of (seed, epoch, step).

There is no state, so a resumed run repeats and skips nothing, and other numbers of ranks see the same batches.
TRL's `pack_dataset` also packs best-fit decreasing, but it copies the tokens and cannot repack per epoch from a seed.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from finetune.data.documents import Document


def pack_best_fit(lengths: np.ndarray, capacity: int, order: np.ndarray) -> list[list[int]]:
    """Pack documents by best-fit decreasing: the longest first, each into the bin where it leaves the least room.

    Time: O(n log n + n · capacity / 1000) for n documents, since at most `capacity` distinct rooms are searched.

    lengths: [N] tokens of each document, at most `capacity`.
    order: indices of the documents to pack, repeats allowed. Documents of one length keep this order.
    Returns: bins of document indices, of at most `capacity` tokens.
    Source: Johnson 1974, the 11/9 bound of best-fit decreasing.
    """
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    bins: list[list[int]] = []
    rooms: list[int] = []  # distinct rooms left in bins, ascending
    with_room: dict[int, list[int]] = {}  # bins by room
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

    Args:
        lengths: [N] tokens of each document.
        weights: [N] copies of each document per epoch. 2.5 means two, and a third for half of the documents, drawn
            anew each epoch.
        capacity: tokens of a packed sequence; None does not pack.
        batch_size: sequences per step; the last step of an epoch may have fewer.
        seed: of order and packing.
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
        self._epoch: tuple[int, list[list[int]]] | None = None  # the last epoch computed
        self._steps: list[int] = []  # of epoch 0, 1, …, as far as computed

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return the sequences of an epoch in order, each a list of document indices."""
        if self._epoch is not None and self._epoch[0] == epoch:
            return self._epoch[1]
        rng = np.random.default_rng([self.seed, epoch])
        whole = np.floor(self.weights)
        copies = (whole + (rng.random(len(whole)) < self.weights - whole)).astype(np.int64)
        order = np.repeat(np.arange(len(copies)), copies)
        rng.shuffle(order)
        sequences = [[i] for i in order.tolist()]
        if self.capacity is not None:
            bins = pack_best_fit(self.lengths, self.capacity, order)
            sequences = [bins[i] for i in rng.permutation(len(bins))]
        self._epoch = epoch, sequences
        return sequences

    def steps_in(self, epoch: int) -> int:
        """Return the optimizer steps of an epoch, at least 1."""
        while len(self._steps) <= epoch:
            self._steps.append(max(1, math.ceil(len(self.epoch(len(self._steps))) / self.batch_size)))
        return self._steps[epoch]

    def steps_for(self, epochs: float) -> int:
        """Return the optimizer steps of `epochs` epochs, fractions rounded up."""
        whole = math.floor(epochs)
        steps = sum(self.steps_in(e) for e in range(whole))
        return steps + math.ceil((epochs - whole) * self.steps_in(whole)) if epochs > whole else steps

    def batch(self, step: int) -> list[list[int]]:
        """Return the sequences of a step (from 0), of all ranks."""
        epoch = 0
        while step >= self.steps_in(epoch):
            step -= self.steps_in(epoch)
            epoch += 1
        return self.epoch(epoch)[step * self.batch_size : (step + 1) * self.batch_size]


class Sampler(Protocol):
    """The order of the training documents: a pure function of the step, without state to save."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides the order and the tokens."""

    def step_batches(self, step: int) -> list[list[Document]]:
        """Return the packed sequences of a step (from 0), of all ranks."""

    def lengths(self, step: int) -> list[int] | None:
        """Return the tokens of each sequence of a step (from 0) without reading rows; None if they are not known yet.

        Of sampled answers, those of the prompts alone.
        """

    def largest(self, step: int) -> list[list[Document]]:
        """Return the sequences of a step (from 0) at their largest, without sampling answers."""

    def steps_for(self, epochs: float) -> int:
        """Return the optimizer steps of `epochs` passes over the rows."""

    def close(self) -> None:
        """Stop background work."""


@dataclass(frozen=True)
class MapSampler:
    """Samples documents that are all available before the first step."""

    documents: Sequence[Document]
    order: SequenceOrder
    digest: str = ""

    def step_batches(self, step: int) -> list[list[Document]]:
        return [[self.documents[i] for i in sequence] for sequence in self.order.batch(step)]

    def lengths(self, step: int) -> list[int]:
        return [int(self.order.lengths[sequence].sum()) for sequence in self.order.batch(step)]

    def largest(self, step: int) -> list[list[Document]]:
        return self.step_batches(step)

    def steps_for(self, epochs: float) -> int:
        return self.order.steps_for(epochs)

    def close(self) -> None:
        """Do nothing: there is no background work."""


def split_among_ranks(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Split a step's sequences among ranks with nearly equal token counts; return ascending indices per rank.

    tokens: length of each sequence. The longest remaining sequence goes to the rank with the fewest tokens.
    Source: Graham 1969, the 4/3 bound of longest processing time first.
    """
    load = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        rank = load.index(min(load))
        load[rank] += tokens[i]
        shares[rank].append(i)
    return [sorted(share) for share in shares]


def micro_batches(tokens: Sequence[int], ranks: int, size: int) -> list[list[list[int]]]:
    """Split a step's sequences among ranks, and each part into passes of `size` sequences; return their indices.

    tokens: as for `split_among_ranks`.
    """
    shares = split_among_ranks(tokens, ranks)
    return [[share[start : start + size] for start in range(0, len(share), size)] for share in shares]
