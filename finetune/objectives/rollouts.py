"""Answers that the model in training samples to the prompts of a step, judged by rewards.

All random draws are a pure function of (seed, round, number of the prompt, number of the answer). The answers also
depend on the weights. So a resumed run needs no saved state, and each rank can write a part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from finetune.config.schema import RewardConfig
from finetune.data.documents import Document, Judged
from finetune.data.encoded import IGNORE_INDEX, Prompt
from finetune.data.packing import Sampler
from finetune.evaluation.generation import SampledIds
from finetune.losses.policy import group_advantages
from finetune.objectives.rewards import Rewards

# Prompts and the draws [G, n] of the answers to each -> the answers. One draw in [0, 1) decides one token.
Writer = Callable[[Sequence[Prompt], Sequence[np.ndarray]], list[list[SampledIds]]]
# Documents with the answers to each -> unweighted rewards [answers, functions] in order.
Judge = Callable[[Sequence[Document], Sequence[Sequence[np.ndarray]]], np.ndarray]
# Separates these draws from those of on-policy distillation, which are seeded by four numbers.
_STREAM = 2


@dataclass(frozen=True)
class Group:
    """The answers to one prompt. rewards: [G, functions], unweighted. finished: [G] bool, not cut at the limit."""

    answers: list[SampledIds]
    rewards: np.ndarray
    finished: np.ndarray


@dataclass
class Rollouts:
    """A sampler of judged answers: a group to each prompt of the sampler that it wraps.

    Several steps (`reward.updates`) train on the same answers: a round.

    Attributes:
        prompts: rows whose tokens before the first target are a prompt; each sequence is one row.
        rewards: their names and weights.
        max_length: limit of a sequence: a prompt, counted once, and answers to it.
        stop_ids: tokens that end an answer.
        equal_rounds: how many rounds in a row, up to the current one, had equal rewards in every group.
        gather: joins the lists of all ranks into one list on every rank.
        figures: of this round's answers.
        lengths_A: tokens of each answer of this round; 0 for those that do not count.
        extremes: the prompt of this round whose rewards differ most, with its best and its worst answer: ids, reward.
    """

    prompts: Sampler
    write: Writer
    judge: Judge
    rewards: Rewards
    cfg: RewardConfig
    max_length: int
    packing: bool
    stop_ids: frozenset[int]
    seed: int
    rank: int = 0
    ranks: int = 1
    gather: Callable[[list[Any]], list[Any]] = list
    figures: dict[str, float] = field(default_factory=dict)
    lengths_A: np.ndarray = field(default_factory=lambda: np.zeros(0))
    extremes: list[tuple[Document, np.ndarray, float]] = field(default_factory=list)
    equal_rounds: int = 0
    _round: int = -1
    _sequences: list[list[Document]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """SHA-256 of the rows, which together with the settings and the weights decide the answers."""
        return self.prompts.digest

    def step_batches(self, step: int) -> list[list[Document]]:
        """Return the answers of a step (from 0) over all ranks, as documents with prompts, packed into sequences.

        Answers that cannot change the loss are left out: without KL, those of a group with equal rewards.
        """
        if step // self.cfg.updates != self._round:
            self._round = step // self.cfg.updates
            start = time.perf_counter()
            prompts = [document for sequence in self.prompts.step_batches(self._round) for document in sequence]
            self._sequences = self._judged(prompts, self._groups(prompts))
            self.figures["sampling_seconds"] = time.perf_counter() - start
        return self._sequences

    def lengths(self, step: int) -> list[int] | None:
        return self.prompts.lengths(step // self.cfg.updates)

    def largest(self, step: int) -> list[list[Document]]:
        """Return answers of full length, which differ from their first token on, so that they share their prompt."""
        prompts = [row for sequence in self.prompts.largest(step // self.cfg.updates) for row in sequence]
        tokens = np.zeros(self.cfg.max_new_tokens, dtype=np.float32)
        answers = [SampledIds(np.full(len(tokens), i, np.int32), tokens) for i in range(self.cfg.group_size)]
        return list(self._packed([[_with_answer(prompt, answer, 1.0) for answer in answers] for prompt in prompts]))

    def steps_for(self, epochs: float) -> int:
        return self.prompts.steps_for(epochs) * self.cfg.updates

    def close(self) -> None:
        self.prompts.close()

    def _groups(self, prompts: Sequence[Document]) -> list[Group]:
        """Sample and judge the answers to all prompts. Each rank writes some of each length."""
        by_length = sorted(range(len(prompts)), key=lambda i: prompts[i].first_target)
        mine = by_length[self.rank :: self.ranks]
        documents = [prompts[i] for i in mine]
        written = self.write([document.prompt() for document in documents], [self._draws(i) for i in mine])
        rewards = self.judge(documents, [[answer.ids for answer in group] for group in written])
        groups = [
            Group(answers, part, np.array([answer.ids[-1] in self.stop_ids for answer in answers]))
            for answers, part in zip(written, rewards.reshape(len(written), -1, len(self.rewards.names)), strict=True)
        ]
        gathered = dict(self.gather(list(zip(mine, groups, strict=True))))
        return [gathered[i] for i in range(len(prompts))]

    def _draws(self, number: int) -> np.ndarray:
        """Return the draws [G, n] of the answers to a prompt of this round."""
        answers = range(self.cfg.group_size)
        seeds = ([self.seed, self._round, number, answer, _STREAM] for answer in answers)
        return np.stack([np.random.default_rng(seed).random(self.cfg.max_new_tokens) for seed in seeds])

    def _judged(self, prompts: Sequence[Document], groups: Sequence[Group]) -> list[list[Document]]:
        rewards_PGF = np.stack([group.rewards for group in groups])
        rewards_PG = self.rewards.total(rewards_PGF)
        advantages_PG = group_advantages(rewards_PG, self.cfg.loss)
        finished_PG = np.stack([group.finished for group in groups])
        lengths_PG = np.array([[len(answer.ids) for answer in group.answers] for group in groups])
        trained_PG = finished_PG | (not self.cfg.skip_unfinished)
        # Of the answers that count: those left out have no tokens, as in TRL.
        self.lengths_A = (lengths_PG * trained_PG).flatten()
        self.figures = self._figures(rewards_PGF, rewards_PG, lengths_PG, finished_PG, groups)
        widest = int(np.ptp(rewards_PG, axis=1).argmax())
        ends = (rewards_PG[widest].argmax(), rewards_PG[widest].argmin())
        self.extremes = [(prompts[widest], groups[widest].answers[i].ids, rewards_PG[widest, i]) for i in ends]
        self.equal_rounds = self.equal_rounds + 1 if self.figures["equal_groups"] == 1 else 0
        equal_P = np.ptp(rewards_PG, axis=1) == 0
        used_PG = trained_PG & (~equal_P[:, None] | bool(self.cfg.beta))
        documents = [
            [
                _with_answer(prompt, answer, float(advantage))
                for answer, advantage, used in zip(group.answers, advantages, some, strict=True)
                if used
            ]
            for prompt, group, advantages, some in zip(prompts, groups, advantages_PG, used_PG, strict=True)
        ]
        # A step needs a document. One without an advantage has no loss.
        if not any(documents):
            documents = [[replace(_with_answer(prompts[0], groups[0].answers[0], 0.0), judged=None)]]
        return list(self._packed(documents))

    def _packed(self, groups: Sequence[Sequence[Document]]) -> Iterator[list[Document]]:
        """Lay groups into sequences, in order. A group that fills more than one is split, and repeats its prompt."""
        sequence: list[Document] = []
        rows = 0
        for group in groups:
            new_group = True
            for document in group:
                prompt, answer = document.first_target + 1, len(document) - document.first_target - 1
                needed = answer + (prompt if new_group or not sequence else 0)
                if sequence and (rows + needed > self.max_length or (new_group and not self.packing)):
                    yield sequence
                    sequence, rows, needed = [], 0, prompt + answer
                sequence.append(document)
                rows += needed
                new_group = False
        if sequence:
            yield sequence

    def _figures(
        self,
        rewards_PGF: np.ndarray,
        rewards_PG: np.ndarray,
        lengths_PG: np.ndarray,
        finished_PG: np.ndarray,
        groups: Sequence[Group],
    ) -> dict[str, float]:
        means_F = rewards_PGF.mean((0, 1)).tolist()
        by_name = zip(self.rewards.names, means_F, strict=True) if len(means_F) > 1 else ()
        scores = np.concatenate([answer.log_probs for group in groups for answer in group.answers])
        return {
            "reward": rewards_PG.mean().item(),
            **{f"reward_{name}": mean for name, mean in by_name},
            "reward_std": rewards_PG.std(1, ddof=1).mean().item(),
            "answer_tokens": lengths_PG.mean().item(),
            "unfinished": 1 - finished_PG.mean().item(),
            "equal_groups": (np.ptp(rewards_PG, axis=1) == 0).mean().item(),
            # The mean of -log p over sampled tokens estimates the entropy without bias.
            "entropy": -scores.mean(dtype=np.float64).item(),
        }


def _with_answer(document: Document, answer: SampledIds, advantage: float) -> Document:
    """Replace what follows the prompt by a sampled answer."""
    start = document.first_target
    ids = np.concatenate([document.ids[: start + 1], answer.ids]).astype(np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    labels[start:-1] = answer.ids
    return replace(document, ids=ids, labels=labels, weights=None, judged=Judged(answer.log_probs, advantage))
