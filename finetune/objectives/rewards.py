"""Judge sampled answers by named rewards and by functions of the user, in TRL's signature.

Shapes: A answers, F rewards. Nothing here imports torch, so that a run checks its rewards before it.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.config.schema import RunConfig
from finetune.config.sections import RewardConfig
from finetune.system.errors import ConfigError, DataError
from finetune.system.user_functions import digest_of, load_function

if TYPE_CHECKING:
    from finetune.objectives.prompts import Prompt

OPTION = "reward_function"
# The columns of a row that TRL keeps for itself, and the names of our own arguments.
RESERVED = frozenset({"prompt", "completion", "prompts", "completions", "completion_ids"})
_SHOWN = 80
# f(prompts=, completions=, completion_ids=, solution=, **columns) -> a number of each answer, or None.
RewardFunction = Callable[..., Sequence[float | None]]


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
class UserReward:
    """A reward function of the user.

    word: loads it on the command line; of a function that is in no file, the form of such a word.
    digest: SHA-256 of the file that defines it; None if it is in no file.
    """

    name: str
    function: RewardFunction
    word: str
    digest: str | None


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


def load_reward_function(word: str) -> UserReward:
    """Load `FILE.py:NAME` or `module:NAME`, as `trl.rewards:think_format_reward`.

    Security: the code is run, so the word must come from the command line, never from a config or data.

    Raises:
        ConfigError: as `load_function`; or the function cannot be called as a reward.
    """
    found = load_function(OPTION, word)
    _check_callable(f"{OPTION}={word}", found.call)
    return UserReward(found.name, found.call, word, found.digest)


def user_rewards(given: UserReward | RewardFunction | Sequence[UserReward | RewardFunction] | None) -> list[UserReward]:
    """Return reward functions, given in Python or loaded, as records.

    Raises:
        ConfigError: one is no function, or two have the same name.
    """
    listed = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
    found = [item if isinstance(item, UserReward) else _from_python(item) for item in listed]
    names = [item.name for item in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{OPTION}: two functions are called {twice[0]}\nhelp: rename one; metrics bear their names")
    return found


def check_rewards(cfg: RunConfig, functions: Sequence[object]) -> None:
    """Raise ConfigError if a run with `reward.loss` has no reward, or another run has functions of the user."""
    if cfg.reward.loss == "none" and functions:
        raise ConfigError(f"{OPTION}: needs reward.loss\nhelp: set reward.loss=grpo, or remove {OPTION}")
    if cfg.reward.loss != "none" and not functions and not cfg.reward.functions:
        raise ConfigError(
            f"reward.functions: empty, so nothing judges the answers\n"
            f"help: set for example reward.functions.number=1, or pass {OPTION}=FILE.py:NAME"
        )


def build_rewards(
    cfg: RewardConfig, function: UserReward | RewardFunction | Sequence[UserReward | RewardFunction] | None = None
) -> Rewards:
    """Build the rewards of a run: those of `reward.functions`, then the user's with weight 1.

    Raises:
        ConfigError: as `user_rewards`; or the file of `reward.json_schema` cannot be used.
    """
    # Metrics of answers import torch.
    from finetune.objectives.reward_functions import BUILT_IN

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


def _from_python(function: Any) -> UserReward:
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)
    _check_callable(f"reward function {name}", function)
    module = sys.modules.get(getattr(inner, "__module__", ""))
    file = getattr(module, "__file__", None) if getattr(module, name, None) is function else None
    return UserReward(name, function, f"{file or 'FILE.py'}:{name}", digest_of(module))


def _check_callable(label: str, function: Any) -> None:
    if not callable(function):
        raise ConfigError(f"{label}: expected a function, found {type(function).__name__}")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise ConfigError(f"{label}: is async, which is not supported\nhelp: write it with def")
    try:
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    except ValueError as error:  # of functions in C
        raise ConfigError(f"{label}: {error}\nhelp: write def NAME(completions, **columns)") from error
    if Parameter.VAR_KEYWORD not in kinds:
        raise ConfigError(f"{label}: takes no **columns\nhelp: write def NAME(completions, **columns)")


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
    return ConfigError(f"{label}: fails for {_described(answers, culprit)}: {type(error).__name__}: {error}")


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
    from finetune.objectives.reward_functions import Compared

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
