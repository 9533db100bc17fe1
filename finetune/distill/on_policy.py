"""Documents whose answers the model in training writes itself, for the teacher to judge.

Which documents, and what chance decides in each, is a pure function of (seed, step, the document's number in the step);
the words depend on the weights besides. So nothing has to be saved for a resumed run, and every rank may write a part.
Source: Agarwal et al. 2024, arXiv:2306.13649 (generalized knowledge distillation, on-policy).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from finetune.data.batch import groups_of
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.sampler import Sampler

# Prompts, each with the draws of its answer -> the answers' ids, in order. A draw, from [0, 1), decides one token, so
# there are as many as the answer may have; an answer has one token or more.
Writer = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], list[np.ndarray]]
# Keeps the draws apart from the order of an epoch, which starts from (seed, epoch): trailing zeros count for nothing.
_STREAM = 1


@dataclass(frozen=True)
class OnPolicySampler:
    """The documents of a sampler; a share of them ends with the model's own answer in the place of one of the row's.

    Which of the row's turns that is, is drawn too: answering the first one only would teach short conversations.
    tokens: most that an answer has. max_length: tokens that no sequence exceeds: one that its answers make longer
    becomes two. gather: joins the lists that the ranks give into one list, on every rank.
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
        """Of the rows; what is written on the way follows from them and the run's settings."""
        return self.sampler.digest

    def step_batches(self, step: int) -> list[list[Document]]:
        """Packed sequences of a step (from 0), over all ranks, written with the weights as they are now."""
        sequences = self.sampler.step_batches(step)
        documents = [document for sequence in sequences for document in sequence]
        answers = self._answers(step, documents)
        written = iter([_answered(d, *answers[i]) if i in answers else d for i, d in enumerate(documents)])
        return [part for s in sequences for part in groups_of(islice(written, len(s)), self.max_length)]

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps that so many passes over the rows take."""
        return self.sampler.steps_for(epochs)

    def close(self) -> None:
        """Let go of what works in the background."""
        self.sampler.close()

    def _answers(self, step: int, documents: Sequence[Document]) -> dict[int, tuple[int, np.ndarray]]:
        """What the chosen documents of a step become, by number: tokens of the prompt, and the answer.

        Each rank writes some, prompts of like length; the weights being the same, it does not matter which.
        """
        plans = {i: plan for i, document in enumerate(documents) if (plan := self._plan(step, i, document)) is not None}
        if not plans:
            return {}
        mine = sorted(plans, key=lambda i: plans[i][0])[self.rank :: self.ranks]
        answers = self.write([documents[i].ids[: plans[i][0]] for i in mine], [plans[i][1] for i in mine])
        return {i: (plans[i][0], answer) for i, answer in self.gather(list(zip(mine, answers, strict=True)))}

    def _plan(self, step: int, number: int, document: Document) -> tuple[int, np.ndarray] | None:
        """Tokens of the prompt, and what decides the answer's; None for a document that stays as it is."""
        chance, turn, *draws = np.random.default_rng([self.seed, step, number, _STREAM]).random(2 + self.tokens)
        trained = document.labels != IGNORE_INDEX
        starts = np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]]))
        if chance >= self.share or not len(starts):
            return None
        prompt = int(starts[int(turn * len(starts))]) + 1
        room = self.max_length - prompt
        return (prompt, np.array(draws[:room])) if room > 0 else None


def _answered(document: Document, prompt: int, answer: np.ndarray) -> Document:
    """A document's first tokens and another answer to them, all of it targets that weigh what the row's first did."""
    ids = np.concatenate([document.ids[:prompt], answer]).astype(np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    labels[prompt - 1 : -1] = answer
    weights = None if document.weights is None else np.full(len(ids), document.weights[prompt - 1], dtype=np.float32)
    return replace(document, ids=ids, labels=labels, weights=weights, student_generated=True)
