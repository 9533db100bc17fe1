"""Checks on combinations of settings with `reward`, for the rules of schema.py."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetune.config.preference_rules import CHANGES_BASE
from finetune.config.problems import Problem
from finetune.config.sections import (
    DataConfig,
    DistillConfig,
    GenerationConfig,
    GuardConfig,
    LoraConfig,
    PreferenceConfig,
    RewardConfig,
    TrainConfig,
)

Problems = Iterator[Problem]

# Rewards and the setting that only they read.
_OWNERS = {"regex": "pattern", "json_schema": "json_schema", "length": "length"}


def reward_settings(reward: RewardConfig) -> Problems:
    fields = type(reward).model_fields
    changed = [key for key, field in fields.items() if getattr(reward, key) != field.get_default()]
    if reward.loss == "none":
        if changed:
            yield Problem("reward.loss", f"reward.{changed[0]} needs grpo, dr_grpo or dapo, found none")
        return
    for name, key in _OWNERS.items():
        if name in reward.functions and getattr(reward, key) is None:
            yield Problem(f"reward.{key}", f"is missing; the reward {name} needs it")
    for name, key in (*_OWNERS.items(), ("format", "format")):
        if name not in reward.functions and getattr(reward, key) is not None:
            yield Problem(f"reward.{key}", f"belongs to the reward {name}; add reward.functions.{name}=1")
    for key in ("pattern", "format"):
        if (pattern := getattr(reward, key)) is not None:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                yield Problem(f"reward.{key}", f"{pattern} is not a valid regular expression: {error}")
    for name, weight in reward.functions.items():
        if not weight:
            yield Problem(f"reward.functions.{name}", "a weight of 0 does nothing; remove it")
    if reward.length is not None and reward.length >= reward.max_new_tokens:
        limit = f"reward.max_new_tokens={reward.max_new_tokens}"
        yield Problem("reward.length", f"must be below {limit}, found {reward.length}")
    if reward.clip_high is not None and reward.clip_high < reward.clip_low:
        yield Problem("reward.clip_high", f"must be at least reward.clip_low, found {reward.clip_high:g}")
    if reward.reference != "auto" and not reward.beta:
        yield Problem("reward.reference", "needs reward.beta above 0, found 0")
    if (reward.engine == "server") != (reward.url is not None):
        text = "is missing; set for example http://localhost:8000" if reward.url is None else "needs engine=server"
        yield Problem("reward.url", text)


def reward_policies(reward: RewardConfig, lora: LoraConfig) -> Problems:
    if reward.loss == "none":
        return
    if lora.dropout:
        yield Problem("lora.dropout", "would train other probabilities than those that answers are sampled with; set 0")
    if reward.reference == "init_adapter" and lora.init_adapter is None:
        yield Problem("reward.reference", "init_adapter needs lora.init_adapter; set it, or reference=base")
    if reward.beta and lora.init in CHANGES_BASE:
        yield Problem("lora.init", f"{lora.init} changes the base, which is the reference; set lora.init=default")


def reward_server(reward: RewardConfig, lora: LoraConfig) -> Problems:
    if reward.loss == "none" or reward.engine != "server":
        return
    for key in ("dora", "modules_to_save", "new_tokens", "rank_pattern", "alpha_pattern"):
        if getattr(lora, key):
            yield Problem(f"lora.{key}", "servers ignore it in an adapter; remove it, or set reward.engine=process")


def reward_rows(reward: RewardConfig, data: DataConfig, generation: GenerationConfig) -> Problems:
    if reward.loss == "none":
        return
    if reward.max_new_tokens >= data.max_length:
        limit = f"data.max_length={data.max_length}, which holds prompt and answers"
        yield Problem("reward.max_new_tokens", f"must be below {limit}, found {reward.max_new_tokens}")
    if data.train_on != "assistant":
        yield Problem("data.train_on", f"does not apply: answers are sampled; remove it, found {data.train_on}")
    if data.truncation not in ("drop", "error"):
        yield Problem("data.truncation", f"would cut prompts; set drop or error, found {data.truncation}")
    if data.stream_rows is not None:
        yield Problem("data.stream_rows", "does not work with reward.loss; set it to null")
    if (data.eval or data.held_out) and not generation.num_examples:
        yield Problem("generation.num_examples", "evaluations judge answers, found 0; set it to 100")


def reward_steps(reward: RewardConfig, train: TrainConfig) -> Problems:
    if reward.loss == "none":
        return
    if train.neftune_alpha:
        yield Problem("train.neftune_alpha", "does not work with reward.loss; set it to 0")
    for key in ("max_steps", "eval_every", "save_every", "pause_at"):
        if (steps := getattr(train, key)) is not None and steps % reward.updates:
            text = f"must be a multiple of reward.updates={reward.updates}, which share answers, found {steps}"
            yield Problem(f"train.{key}", text)


def reward_alone(
    reward: RewardConfig, distill: DistillConfig, preference: PreferenceConfig, guard: GuardConfig
) -> Problems:
    if reward.loss == "none":
        return
    for key, value in (("distill.objective", distill.objective), ("preference.objective", preference.objective)):
        if value != "none":
            yield Problem(key, "does not work with reward.loss; set one of them to none")
    if guard.max is not None:
        yield Problem("guard.max", "does not work with reward.loss; set reward.beta, and guard.max to null")
