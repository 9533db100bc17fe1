"""Judge sampled answers by named rewards and by functions of the user, in TRL's signature.

Shapes: A answers, F rewards.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from finetune.config.sections import RewardConfig
from finetune.objectives.prompts import Prompt
from finetune.objectives.reward_functions import BUILT_IN, Compared
from finetune.objectives.user_rewards import OPTION, RewardFunction, UserReward, user_rewards
from finetune.system.errors import ConfigError, DataError

# The columns of a row that TRL keeps for itself, and the names of our own arguments.
RESERVED = frozenset({"prompt", "completion", "prompts", "completions", "completion_ids"})
_SHOWN = 80


@dataclass(frozen=True)
class SampledAnswers:
    """Answers to judge; every list has one entry per answer.

    prompts: messages before the answer, with OpenAI's keys.
    texts: decoded, without control tokens.
    ids: tokens, the end token among them.
    expected: the row's last assistant turn; empty for a row without one.
    columns: of the rows, as in their file.
    """

    prompts: list[list[dict[str, Any]]]
    texts: list[str]
    ids: list[list[int]]
    expected: list[str]
    columns: dict[str, list[Any]]

    @classmethod
    def of(cls, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> SampledAnswers:
        """Join answers with the prompts that they answer; a column that a row lacks is None there."""
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        return cls(
            prompts=[prompt.messages for prompt in prompts],
            texts=list(texts),
            ids=[list(tokens) for tokens in ids],
            expected=[prompt.expected for prompt in prompts],
            columns={name: [prompt.columns.get(name) for prompt in prompts] for name in names},
        )

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, which: slice) -> SampledAnswers:
        lists = (self.prompts[which], self.texts[which], self.ids[which], self.expected[which])
        return SampledAnswers(*lists, {name: values[which] for name, values in self.columns.items()})

    def arguments(self) -> dict[str, Any]:
        """Return what a function gets, as new lists: it may change them."""
        columns = {name: list(values) for name, values in self.columns.items() if name not in RESERVED}
        return {
            "prompts": [[dict(message) for message in prompt] for prompt in self.prompts],
            "completions": [[{"role": "assistant", "content": text}] for text in self.texts],
            "completion_ids": [list(tokens) for tokens in self.ids],
            **columns,
            "solution": solutions(self.expected, self.columns),
        }


def solutions(expected: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Return what answers are compared with: the column `solution` of a row that has one, else its answer."""
    own = columns.get("solution", [None] * len(expected))
    return [text if value is None else value for value, text in zip(own, expected, strict=True)]


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run.

    names: for metrics, each once. weights: of `total`. labels: how messages call each reward.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    labels: tuple[str, ...]
    functions: tuple[RewardFunction, ...]

    def judge(self, answers: SampledAnswers) -> np.ndarray:
        """Return the reward of each answer by each function [A, F] float64, without weights.

        None from a function counts as 0: the reward does not apply to this answer, as in TRL.

        Raises:
            ConfigError: a function fails, or does not return one finite number, or None, for each answer.
        """
        columns = [_judged(label, call, answers) for label, call in zip(self.labels, self.functions, strict=True)]
        return np.array(columns, dtype=np.float64).reshape(len(columns), len(answers)).T

    def total(self, judged: np.ndarray) -> np.ndarray:
        """Return the weighted sum of the rewards of each answer [A] float64."""
        return judged @ np.array(self.weights, dtype=np.float64)


def build_rewards(
    cfg: RewardConfig, function: UserReward | RewardFunction | Sequence[UserReward | RewardFunction] | None = None
) -> Rewards:
    """Build the rewards of a run: those of `reward.functions`, then the user's with weight 1.

    Raises:
        ConfigError: as `user_rewards`; or the file of `reward.json_schema` cannot be used.
    """
    own = user_rewards(function)
    if clash := [reward.name for reward in own if reward.name in cfg.functions]:
        raise ConfigError(f"{OPTION}: {clash[0]} is also in reward.functions; rename the function")
    labels = [f"reward.functions.{name}" for name in cfg.functions]
    return Rewards(
        names=(*cfg.functions, *(reward.name for reward in own)),
        weights=(*cfg.functions.values(), *(1.0 for _ in own)),
        labels=(*labels, *(f"{OPTION}={reward.word}" for reward in own)),
        functions=(*(BUILT_IN[name](cfg) for name in cfg.functions), *(reward.function for reward in own)),
    )


def _judged(label: str, function: RewardFunction, answers: SampledAnswers) -> list[float]:
    try:
        returned: Any = function(**answers.arguments())
    except Exception as error:
        raise _failure(label, function, answers, error) from error
    # Arrays and tensors too.
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{label}: must return a list of numbers, found {type(returned).__name__}")
    if len(values) != len(answers):
        raise ConfigError(f"{label}: must return one number per answer, found {len(values)} for {len(answers)}")
    return [_number(label, value, answers, i) for i, value in enumerate(values)]


def _number(label: str, value: Any, answers: SampledAnswers, i: int) -> float:
    if value is None:
        return 0.0
    value = value.item() if hasattr(value, "item") else value
    try:
        if isinstance(value, Real) and math.isfinite(number := float(value)):
            return number
    except OverflowError:  # a whole number beyond float64
        pass
    raise ConfigError(
        f"{label}: must return a finite number or None for each answer, found {value!r:.{_SHOWN}} for "
        f"{_described(answers, i)}"
    )


def _failure(label: str, function: RewardFunction, answers: SampledAnswers, error: Exception) -> ConfigError:
    """Describe the error of a function, and find the answer that causes it."""
    culprit = 0
    for i in range(len(answers)):
        try:
            function(**answers[i : i + 1].arguments())
        except Exception as again:  # noqa: BLE001 - the first of these is reported
            culprit, error = i, again
            break
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename}:{frame.lineno}"
    return ConfigError(f"{label}: fails for {_described(answers, culprit)}: {type(error).__name__}: {error} ({place})")


def _described(answers: SampledAnswers, i: int) -> str:
    prompt = answers.prompts[i][-1].get("content", "") if answers.prompts[i] else ""
    return f"the answer {_cut(answers.texts[i])} to {_cut(str(prompt))}"


def _cut(text: str) -> str:
    return repr(text[:_SHOWN]) + ("…" if len(text) > _SHOWN else "")


def check_prompts(rewards: Rewards, prompts: Iterable[Prompt]) -> None:
    """Check that the rows have what the rewards of a run need.

    Raises:
        ConfigError: a function takes a column that no row has.
        DataError: a reward that compares answers finds nothing to compare with in some rows.
    """
    rows = list(prompts)
    empty = SampledAnswers.of(rows, [""] * len(rows), [[]] * len(rows)).arguments()
    expected = empty["solution"]
    for label, function in zip(rewards.labels, rewards.functions, strict=True):
        try:
            inspect.signature(function).bind(**empty)
        except TypeError as error:
            raise ConfigError(f"{label}: {error}\nhelp: a function gets {', '.join(sorted(empty))}") from error
        if not isinstance(function, Compared):
            continue
        bad = [i for i, value in enumerate(expected) if not function.can_compare(str(value))]
        if bad:
            raise DataError(
                f"{label}: nothing to compare with in the expected answers of {len(bad):,} of {len(rows):,} rows, "
                f"first {rows[bad[0]].location}: {_cut(str(expected[bad[0]]))}\n"
                "help: map the column that holds it, as columns: {completion: answer}, or choose another reward"
            )
