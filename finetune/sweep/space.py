"""The settings that vary, in Hydra's syntax: `lora.rank=8,16`, `interval(1e-5,1e-3)`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, OverrideType, QuotedString, RangeSweep
from hydra.errors import HydraException

from finetune.config.keys import find
from finetune.config.problems import COMMAND_LINE, Problem, config_error
from finetune.system.resources import packaged

MOST_RUNS = 1000
_OURS = {
    "output_dir": "set by the sweep; set sweep.out instead",
    "train.resume": "set by the sweep, which resumes by itself",
}


@dataclass(frozen=True)
class Parameter:
    """A setting that varies.

    Attributes:
        word: as typed.
        choices: values as override texts; empty for an interval.
        low, high: ends of an interval.
        whole: only whole numbers.
        logarithmic: scale of the search.
        ordered: choices are numbers of which neighbors are alike.
        only_with: another parameter of which the value must be one of these; None: drawn always.
    """

    key: str
    word: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    logarithmic: bool = False
    ordered: bool = False
    only_with: tuple[str, frozenset[str]] | None = None

    def describe(self) -> str:
        """Return the parameter and its values."""
        if self.choices:
            return f"{self.key}: {' '.join(self.choices)}"
        return f"{self.key}: {self.low:g} to {self.high:g}{', logarithmic' if self.logarithmic else ''}"


@dataclass(frozen=True)
class Space:
    """The fixed overrides of all runs, and the settings that vary, in the order typed."""

    fixed: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @property
    def combinations(self) -> int:
        return math.prod(len(parameter.choices) for parameter in self.parameters)

    def words(self, values: Mapping[str, str]) -> list[str]:
        """Return the overrides of a run with these values of the parameters, beside the fixed ones."""
        return [f"{key}={value}" for key, value in values.items()]

    def grid(self) -> Iterator[dict[str, str]]:
        """Yield every combination, as key -> value; the last key varies fastest."""
        keys = [parameter.key for parameter in self.parameters]
        for values in product(*(parameter.choices for parameter in self.parameters)):
            yield dict(zip(keys, values, strict=True))


def read_space(words: Sequence[str], config: str, searching: bool, may_be_fixed: bool = False) -> Space:
    """Separate fixed and varying overrides; `searching` allows intervals, `may_be_fixed` words that vary nothing.

    Raises:
        ConfigError: with every problem.
    """
    fixed, parameters, problems = [], [], []
    # As for a run, the last override of a key wins.
    for key, word in {word.partition("=")[0].strip().lstrip("+"): word for word in words}.items():
        if key in _OURS:
            problems.append(Problem(key, _OURS[key], COMMAND_LINE))
        elif (override := _parsed(word)) is None or not override.is_sweep_override():
            fixed.append(word)
        else:
            try:
                parameters.append(_parameter(key, word, override, config))
            except ValueError as error:
                problems.append(Problem(key, str(error), COMMAND_LINE))
    problems += [
        Problem(parameter.key, "an interval needs a search; set sweep.trials=20, or list values", COMMAND_LINE)
        for parameter in parameters
        if not parameter.choices and not searching
    ]
    if not parameters and not problems and not may_be_fixed:
        text = "no setting varies; list several values, as train.learning_rate=1e-4,2e-4"
        problems.append(Problem("", text, COMMAND_LINE))
    space = Space(tuple(fixed), tuple(parameters))
    if not searching and not problems and space.combinations > MOST_RUNS:
        text = f"the grid has more than {MOST_RUNS:,} runs; search with sweep.trials=50"
        problems.append(Problem("", text, COMMAND_LINE))
    if problems:
        raise config_error("the sweep", problems, lambda key: "")
    return space


def _parsed(word: str) -> Override | None:
    """Parse an override; None for text outside Hydra's grammar, which the config checks (a regex, a path)."""
    try:
        override = OverridesParser.create().parse_override(word)
    except (HydraException, RecursionError):
        return None
    return override if override.type in (OverrideType.CHANGE, OverrideType.ADD, OverrideType.FORCE_ADD) else None


def _parameter(key: str, word: str, override: Override, config: str) -> Parameter:
    """Build a parameter. Raises ValueError with the problem."""
    value = override._value
    if isinstance(value, IntervalSweep):
        return _interval(key, word, value)
    if isinstance(value, Glob):
        choices = sorted(value.filter(_options(key, config)))
        if not choices:
            raise ValueError(f"no option of the group matches; options: {', '.join(_options(key, config))}")
        return Parameter(key, word, tuple(choices))
    choices = list(dict.fromkeys(islice(map(_text, override.sweep_iterator()), MOST_RUNS + 1)))
    if not choices:
        raise ValueError("no value")
    ordered = isinstance(value, RangeSweep) and {type(value.start), type(value.step)} == {int}
    return Parameter(key, word, tuple(choices), ordered=ordered)


def _interval(key: str, word: str, value: IntervalSweep) -> Parameter:
    low, high = value.start, value.end
    if low is None or high is None or low >= high:
        raise ValueError(f"the interval is empty, found {low} to {high}; the first number must be smaller")
    logarithmic = "log" in value.tags
    if logarithmic and low <= 0:
        raise ValueError(f"a logarithmic interval must start above 0, found {low}")
    kinds = set(_kinds(find(key)))
    whole = type(low) is type(high) is int or (int in kinds and float not in kinds)
    if whole and not (float(low).is_integer() and float(high).is_integer()):
        raise ValueError(f"must be whole numbers, found {low} to {high}")
    return Parameter(key, word, (), float(low), float(high), whole, logarithmic)


def _kinds(kind: Any) -> Iterator[Any]:
    """Yield a type and its arguments, recursively."""
    yield kind
    for inner in get_args(kind):
        yield from _kinds(inner)


def _options(group: str, config: str) -> list[str]:
    folders = (Path(config).expanduser().parent, Path.cwd(), Path.cwd() / "configs", packaged("configs"))
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def _text(value: Any) -> str:
    """Format a value as an override."""
    if isinstance(value, QuotedString):
        return value.with_quotes()
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return value if isinstance(value, str) else str(Override._get_value_element_as_str(value))
