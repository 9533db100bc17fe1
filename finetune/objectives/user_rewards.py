"""The user's reward functions: loaded by their words on the command line, or given in Python.

Nothing here imports torch or numpy, so that a command line is checked in no time.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from finetune.config.schema import RunConfig
from finetune.system.errors import ConfigError
from finetune.system.user_functions import digest_of, load_function

OPTION = "reward_function"
# f(prompts=, completions=, completion_ids=, solution=, **columns) -> a number of each answer, or None.
RewardFunction = Callable[..., Sequence[float | None]]


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
