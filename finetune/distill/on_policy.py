"""On-policy distillation: the student writes the answers of a share of the documents, and the teacher scores them.

The choice of documents and all random draws are a pure function of (seed, step, number of the document in the step).
The answers also depend on the weights. So a resumed run needs no saved state, and each rank can write a part.
Source: Agarwal et al. 2024, arXiv:2306.13649 (generalized knowledge distillation, on-policy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from finetune.data.batch import groups_of
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX, Prompt
from finetune.data.packing import Sampler

# Prompts and the draws of each answer -> ids of the answers, in order. One draw in [0, 1) decides one token, so the
# number of draws limits the answer; an answer has at least one token.
Writer = Callable[[Sequence[Prompt], Sequence[np.ndarray]], list[np.ndarray]]
# Separates these draws from the order of an epoch, which is seeded by (seed, epoch) padded with zeros.
_STREAM = 1


@dataclass(frozen=True)
class OnPolicySampler:
    """A sampler that replaces an answer by the student's in a share of the documents.

    The turn is drawn, too: replacing only the first would train on short conversations.

    Attributes:
        share: probability that a document is replaced.
        tokens: limit of an answer.
        max_length: limit of a sequence; one that exceeds it with its new answers is split.
        gather: joins the lists of all ranks into one list on every rank.
    """

    sampler: Sampler
    write: Writer
    share: float
    tokens: int
    max_length: int
    seed: int
    rank: int = 0
    ranks: int = 1
    gather: Callable[[list[Any]], list[Any]] = list

    @property
    def digest(self) -> str:
        """SHA-256 of the rows, which together with the settings decide the answers."""
        return self.sampler.digest

    def step_batches(self, step: int) -> list[list[Document]]:
        """Return the packed sequences of a step (from 0) over all ranks, with answers of the current weights."""
        sequences = self.sampler.step_batches(step)
        documents = [document for sequence in sequences for document in sequence]
        return self._repacked(sequences, documents, self._answers(step, documents))

    def lengths(self, step: int) -> list[int] | None:
        return self.sampler.lengths(step)

    def largest(self, step: int) -> list[list[Document]]:
        """Return the rows with answers as long as the student may write."""
        sequences = self.sampler.largest(step)
        documents = [document for sequence in sequences for document in sequence]
        plans = {i: plan for i, document in enumerate(documents) if (plan := self._plan(step, i, document)) is not None}
        answers = {i: (prompt, np.zeros(len(draws), dtype=np.int32)) for i, (prompt, draws) in plans.items()}
        return self._repacked(sequences, documents, answers)

    def steps_for(self, epochs: float) -> int:
        return self.sampler.steps_for(epochs)

    def close(self) -> None:
        self.sampler.close()

    def _repacked(
        self,
        sequences: Sequence[Sequence[Document]],
        documents: Sequence[Document],
        answers: Mapping[int, tuple[int, np.ndarray]],
    ) -> list[list[Document]]:
        """Return sequences with (prompt length, answer) of some documents, split where they became too long."""
        written = iter([_answered(d, *answers[i]) if i in answers else d for i, d in enumerate(documents)])
        return [part for s in sequences for part in groups_of(islice(written, len(s)), self.max_length)]

    def _answers(self, step: int, documents: Sequence[Document]) -> dict[int, tuple[int, np.ndarray]]:
        """Return (prompt length, answer) of the chosen documents, by number. Each rank writes some of each length."""
        plans = {i: plan for i, document in enumerate(documents) if (plan := self._plan(step, i, document)) is not None}
        if not plans:
            return {}
        mine = sorted(plans, key=lambda i: plans[i][0])[self.rank :: self.ranks]
        answers = self.write([documents[i].prompt(plans[i][0]) for i in mine], [plans[i][1] for i in mine])
        return {i: (plans[i][0], answer) for i, answer in self.gather(list(zip(mine, answers, strict=True)))}

    def _plan(self, step: int, number: int, document: Document) -> tuple[int, np.ndarray] | None:
        """Return the prompt length and the draws of the answer; None for an unchanged document."""
        chance, turn, *draws = np.random.default_rng([self.seed, step, number, _STREAM]).random(2 + self.tokens)
        trained = document.labels != IGNORE_INDEX
        starts = np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]]))
        if chance >= self.share or not len(starts):
            return None
        prompt = int(starts[int(turn * len(starts))]) + 1
        room = self.max_length - prompt
        return (prompt, np.array(draws[:room])) if room > 0 else None


def _answered(document: Document, prompt: int, answer: np.ndarray) -> Document:
    """Replace what follows the prompt by the answer, with the weight of the row's first target."""
    ids = np.concatenate([document.ids[:prompt], answer]).astype(np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    labels[prompt - 1 : -1] = answer
    weights = None if document.weights is None else np.full(len(ids), document.weights[prompt - 1], dtype=np.float32)
    placed = document.cut(slice(0, prompt)).placed
    return replace(document, ids=ids, labels=labels, weights=weights, placed=placed, student_generated=True)
