"""Learning from rewards (GRPO): the loss module of a run, and the rewards of its answers to held-out rows.

Shapes: N target tokens, A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn

from finetune.config.schema import RewardConfig, RunConfig
from finetune.data.batch import Batch
from finetune.data.documents import Document, leave_room
from finetune.data.loader import LoadedData
from finetune.data.packing import Sampler
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.evaluation.generation import FEWER_AT_ONCE, Answer, decode, sample_answers
from finetune.evaluation.intervals import Bootstrap, share_of
from finetune.evaluation.scoring import evaluating
from finetune.losses.cross_entropy import vocabulary_rows
from finetune.losses.hidden_states import copy_together
from finetune.losses.policy import PolicyTokens, normalization, policy_losses, token_log_probs, token_weights
from finetune.models.adapters.files import save_adapter
from finetune.objectives.policies import ReferencePolicy, base_policy, initial_policy
from finetune.objectives.prompts import Prompts, read_prompts
from finetune.objectives.rewards import Rewards, SampledAnswers, build_rewards, check_prompts, solutions
from finetune.objectives.rollout_server import RolloutServer, connect
from finetune.objectives.rollouts import Rollouts, Writer
from finetune.objectives.user_rewards import UserReward
from finetune.parallel.in_step import in_step
from finetune.parallel.sharding import is_sharded
from finetune.system.console import Log
from finetune.system.errors import ConfigError, DataError, FinetuneError
from finetune.system.out_of_memory import in_halves

_RESAMPLES = 1000
_EQUAL_ROUNDS = 5
_TEACH = (
    "help: read the sampled answers in report.html; choose rewards that some answers get and others do not, raise "
    "reward.group_size or reward.max_new_tokens, or train on answers first"
)


class PolicyLoss(nn.Module):
    """The training loss as a module that contains the model.

    forward(batch) returns the weighted sum of the losses of the batch's tokens, fp32; the caller divides by
    `normalization`. The first update on some answers stores their log-probabilities for the next ones, so later updates
    must give the same answers in the same order; a batch may hold other numbers of them.
    """

    def __init__(self, model: nn.Module, cfg: RewardConfig, reference: ReferencePolicy | None):
        super().__init__()
        self.model = model
        self.cfg = cfg
        self._reference = reference
        self._first = True
        self._stored: list[tuple[Tensor, Tensor | None]] = []  # of each first batch: old and reference log-probs [N]
        self._next = 0  # of all targets stored, the first of the next batch
        self._sums = torch.zeros(4, dtype=torch.float64)  # clipped, divergence, tokens; the largest sampling gap

    def start(self, update: int) -> None:
        """Begin a step, the `update`-th (from 0) on the same answers."""
        self._first, self._next = update == 0, 0
        if self._first:
            self._stored.clear()

    def forward(self, batch: Batch) -> Tensor:
        temperature = self.cfg.temperature
        log_probs_N = token_log_probs(self.model, batch, temperature)
        reference_N = None
        if self._first and self._reference is not None:  # also without answers: all ranks make the same passes
            with torch.no_grad(), self._reference():
                reference_N = token_log_probs(self.model, batch, temperature)
        if batch.advantages is None or batch.sampled_log_probs is None:  # no answer to learn from
            return log_probs_N.sum() * 0
        if self._first:
            self._stored.append((log_probs_N.detach(), reference_N))
        old_N, reference_N = self._before(len(log_probs_N))
        counts, device = batch.target_counts, log_probs_N.device
        advantages_N, sampled_N = copy_together(
            [batch.advantages.repeat_interleave(counts), batch.sampled_log_probs], device
        )
        tokens = PolicyTokens(log_probs_N, old_N, advantages_N, reference_N)
        losses_N, clipped_N, divergence_N = policy_losses(tokens, self.cfg)
        [counts_A] = copy_together([counts], device)
        self._count(clipped_N, divergence_N, old_N - sampled_N)
        return (losses_N * token_weights(counts_A, self.cfg)).sum()

    def _before(self, targets: int) -> tuple[Tensor, Tensor | None]:
        """Return what the first update stored for the next targets [N]: log-probabilities, those of the reference."""
        if self._first:
            return self._stored[-1]
        some = slice(self._next, self._next + targets)
        self._next += targets
        old, reference = zip(*self._stored, strict=True)
        return torch.cat(old)[some], None if reference[0] is None else torch.cat(reference)[some]

    def take_sums(self) -> Tensor:
        """Return clipped tokens, divergence, tokens, and the largest sampling gap since the last call, on the CPU."""
        sums, self._sums = self._sums, torch.zeros(4, dtype=torch.float64)
        return sums

    @torch.no_grad()
    def _count(self, clipped_N: Tensor, divergence_N: Tensor, gap_N: Tensor) -> None:
        sums = torch.stack([clipped_N.double().sum(), divergence_N.double().sum(), gap_N.abs().max().double()]).cpu()
        tokens = torch.tensor([len(clipped_N)], dtype=torch.float64)
        gap = torch.maximum(self._sums[3:], sums[2:])
        self._sums = torch.cat([self._sums[:2] + sums[:2], self._sums[2:3] + tokens, gap])


@dataclass(frozen=True)
class AnswerJudge:
    """Judges answers to rows, by the rewards of a run."""

    rewards: Rewards
    prompts: Prompts
    chat: ChatTemplate

    def __call__(self, documents: Sequence[Document], answers: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """Return the rewards [answers, functions], unweighted, in order. answers: ids, of each document."""
        rows = [row for row, group in zip(documents, answers, strict=True) for _ in group]
        ids = [each for group in answers for each in group]
        texts = [self.chat.decode(each) for each in ids]
        prompts = [self.prompts.of(row) for row in rows]
        return self.rewards.judge(SampledAnswers.of(prompts, texts, [each.tolist() for each in ids]))

    def answer(self, document: Document, ids: np.ndarray, reward: float) -> Answer:
        """Return an answer to a row in texts. reward: the total."""
        prompt = self.prompts.of(document)
        [expected] = solutions([prompt.expected], {"solution": [prompt.columns.get("solution")]})
        return Answer(prompt.question, str(expected), self.chat.decode(ids), float(reward), document.media)


@dataclass(frozen=True)
class PolicySetup:
    """What a run needs to learn from rewards. rollouts: the sampler of its answers."""

    cfg: RunConfig
    loss: PolicyLoss
    model: PeftModel
    judge: AnswerJudge
    rollouts: Rollouts
    log: Log

    def count(self, documents: Sequence[Document]) -> float:
        """Return what the summed loss is divided by: of all answers, also those that were left out."""
        return normalization(self.rollouts.lengths_A, self.cfg.reward)

    def take_sums(self) -> Tensor:
        """Return this rank's sums since the last call."""
        return self.loss.take_sums()

    def figures_of(self, of_ranks: Tensor) -> dict[str, float]:
        """Return the figures of the answers, and those of the update over all ranks.

        `sampling_gap` is the largest difference, over all tokens, of the log-probability that sampling used and that
        the first update computes, in nats.
        """
        clipped, divergence, tokens, _ = of_ranks.sum(0).tolist()
        figures = dict(self.rollouts.figures)
        if tokens:
            figures["sampling_gap"] = of_ranks[:, 3].max().item()
        if tokens and self.cfg.reward.updates > 1:
            figures["clipped"] = clipped / tokens
        if tokens and self.cfg.reward.beta:
            figures["divergence"] = divergence / tokens
        return figures

    @torch.no_grad()
    def evaluate(self, documents: Sequence[Document]) -> tuple[dict[str, float], list[Answer]]:
        """Answer the first held-out rows greedily, and judge the answers.

        Returns:
            The mean reward with its 95 % interval; `loss` is the negative reward: what training lowers. And the answers
            in the order of the rows.
        """
        cfg, rollouts = self.cfg, self.rollouts
        by_length = sorted(range(min(len(documents), cfg.generation.num_examples)), key=lambda i: len(documents[i]))
        mine = by_length[rollouts.rank :: rollouts.ranks]
        judged: list[tuple[int, np.ndarray, np.ndarray]] = []
        options: Any = {"stop_ids": rollouts.stop_ids, "vocabulary": vocabulary_rows(self.model)}

        def write(numbers: Sequence[int]) -> list[list[int]]:
            prompts = [documents[i].prompt() for i in numbers]
            return decode(self.model, prompts, [cfg.reward.max_new_tokens] * len(numbers), **options)

        splits = not is_sharded(self.model)
        with evaluating(self.model), in_step(self.model):
            for start in range(0, len(mine), cfg.generation.batch_size):
                batch = mine[start : start + cfg.generation.batch_size]
                for numbers, written in in_halves(batch, write, FEWER_AT_ONCE, splits=splits):
                    answers = [np.array(ids) for ids in written]
                    rows = [documents[i] for i in numbers]
                    judged += zip(numbers, answers, self.judge(rows, [[ids] for ids in answers]), strict=True)
        _, ids, rewards = zip(*sorted(rollouts.gather(judged), key=lambda each: each[0]), strict=True)
        totals = self.judge.rewards.total(np.array(rewards))
        reward = share_of(totals, Bootstrap(len(totals), _RESAMPLES, 0).ratio(totals, np.ones(len(totals))))
        figures = {
            "loss": 0.0 - reward.value,
            "reward": reward.value,
            "reward_low": reward.low,
            "reward_high": reward.high,
        }
        return figures, [self.judge.answer(documents[i], ids[i], totals[i]) for i in range(len(ids))]

    def best_and_worst(self) -> list[Answer]:
        """Return the best and the worst answer to one prompt of this step: the one whose rewards differ most."""
        return [self.judge.answer(*found) for found in self.rollouts.extremes]

    def before_step(self, step: int, _: object) -> None:
        """Tell the loss which update on the same answers a step (from 1) is; warn of rewards that teach nothing."""
        update = (step - 1) % self.cfg.reward.updates
        self.loss.start(update)
        if update:
            self.rollouts.figures.pop("sampling_seconds", None)
        if not update and self.rollouts.equal_rounds == _EQUAL_ROUNDS:
            self.log(f"WARNING: reward: all groups of the last {_EQUAL_ROUNDS} rounds have equal rewards\n{_TEACH}")

    def check_taught(self) -> None:
        """Raise FinetuneError if the adapter is as new: no reward ever differed within a group."""
        factors = [parameter for name, parameter in self.model.named_parameters() if "lora_B" in name]
        if not any(bool(factor.any()) for factor in factors):
            raise FinetuneError(
                f"reward: every group of every step has equal rewards, so nothing was learned\n{_TEACH}"
            )


def prompts_with_room(cfg: RunConfig, data: LoadedData, log: Log) -> np.ndarray:
    """Return which training prompts [M] leave room for an answer of `reward.max_new_tokens`; the others are left out.

    Raises:
        DataError: no prompt does; or one does not, and `data.truncation=error`.
    """
    prompt_tokens, kept = data.documents.prompt_lengths, leave_room(data.documents, cfg)
    if kept.all():
        return kept
    settings = f"data.max_length={cfg.data.max_length} and reward.max_new_tokens={cfg.reward.max_new_tokens}"
    text = f"{(~kept).sum():,} of {len(kept):,} prompts are too long for {settings} (longest: {prompt_tokens.max():,})"
    if not kept.any() or cfg.data.truncation == "error":
        first = data.documents[int(np.flatnonzero(~kept)[0])].location
        raise DataError(
            f"data.train: {text}, first {first}\nhelp: raise data.max_length, or lower reward.max_new_tokens"
        )
    log(f"data: {text}; left out")
    return kept


def prepare_judge(
    cfg: RunConfig, own: Sequence[UserReward], data: LoadedData, preparation: Preparation
) -> AnswerJudge | None:
    """Build the rewards of a run, and read what they compare with; None for a run without rewards.

    own: the user's functions.

    Raises:
        ConfigError: as `build_rewards` and `connect`.
        ResourceError: as `connect`.
        DataError: rows hold nothing to compare with.
    """
    if cfg.reward.loss == "none":
        return None
    rewards = build_rewards(cfg.reward, own)
    prompts = read_prompts((*data.train, *data.eval), preparation)
    check_prompts(rewards, prompts)
    if cfg.reward.engine == "server":
        if any(store.has_media.any() for store in data.stores):
            raise ConfigError(
                "reward.engine=server: the rows hold media, which only this process reads\n"
                "help: set reward.engine=process"
            )
        connect(cfg)  # fails now, before weights are loaded
    return AnswerJudge(rewards, prompts, preparation.chat)


def build_reinforcement(
    cfg: RunConfig,
    model: PeftModel,
    prompts: Sampler,
    judge: AnswerJudge,
    *,
    accelerator: Accelerator,
    log: Log,
) -> PolicySetup:
    """Build the loss, the sampler of answers and the reference policy of a run with rewards.

    prompts: rows whose tokens before the first target are a prompt; each sequence is one row.
    """
    reward = cfg.reward
    initial = reward.reference != "base" and cfg.lora.init_adapter is not None
    policy = None if not reward.beta else initial_policy(model) if initial else base_policy(model)
    name = "none" if policy is None else f"{cfg.model.name} with {cfg.lora.init_adapter}" if initial else cfg.model.name
    log(f"reward: loss={reward.loss}, answers={reward.group_size} to each prompt, reference={name}")
    vocabulary = vocabulary_rows(model)
    stop_ids = frozenset(judge.chat.stop_ids())

    write: Writer = partial(
        sample_answers, model, stop_ids=stop_ids, vocabulary=vocabulary, temperature=reward.temperature
    )
    if reward.engine == "server":
        write = RolloutServer(cfg, partial(save_adapter, model), accelerator).write
    rollouts = Rollouts(
        prompts,
        write,
        judge,
        judge.rewards,
        reward,
        max_length=cfg.data.max_length,
        packing=cfg.data.packing,
        stop_ids=stop_ids,
        seed=cfg.train.seed,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        gather=gather_object,
    )
    return PolicySetup(cfg, PolicyLoss(model, reward, policy), model, judge, rollouts, log)
