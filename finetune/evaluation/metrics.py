"""How good an answer is, as a number: same words, same part of them, same number, or what a user's function says."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evaluation.generation import Answer
from finetune.system.errors import ConfigError, DataError

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")
_GSM8K_MARK = "####"
_SHOWN = 60


@dataclass(frozen=True)
class Metric:
    """name: for tables. score: of one answer. part: what is compared of a text, None where nothing of it can be; a
    metric without one compares otherwise.
    """

    name: str
    score: Callable[[Answer], float]
    part: Callable[[str], Any] | None = None

    def check(self, answers: Sequence[Answer]) -> None:
        """Raises: DataError if rows' own answers hold nothing to compare with."""
        if self.part is None:
            return
        lost = [answer.expected for answer in answers if self.part(answer.expected) is None]
        if lost:
            raise DataError(
                f"metric={self.name}: finds nothing in {len(lost):,} of {len(answers):,} rows' own answers, first in "
                f"{lost[0][:_SHOWN]!r}; choose another metric or other rows"
            )

    def scores(self, answers: Sequence[Answer]) -> np.ndarray:
        """Of each answer [R] float64. Raises: ConfigError if a user's function gives no number."""
        return np.array([self.score(answer) for answer in answers], dtype=np.float64)


def find_metric(word: str, pattern: str | None) -> Metric:
    """The metric of that word: `exact`, `number`, `regex` with its pattern, or `FILE.py:FUNCTION`.

    Code is run that the file holds: the word must come from the command line, never from a config or from data.
    Raises: ConfigError.
    """
    if (word == "regex") != (pattern is not None):
        advice = "metric=regex needs one, as 'pattern=answer: (.*)'" if word == "regex" else "is for metric=regex"
        raise ConfigError(f"pattern: {advice}")
    if word == "exact":
        return Metric("exact match", lambda answer: float(answer.exact))
    if word == "number":
        return _comparing("number", number_in)
    if pattern is not None:
        return _comparing("regex", _group(pattern))
    file, found, name = word.rpartition(":")
    if not found or not file.endswith(".py"):
        raise ConfigError(f"metric={word}: there are exact, number, regex, and FILE.py:FUNCTION")
    return Metric(name, _checked(word, _load(word, Path(file).expanduser(), name)))


def number_in(text: str) -> Decimal | None:
    """The number after `####` as GSM8K writes its answers, else the last one of the text; None without any."""
    _, mark, after = text.rpartition(_GSM8K_MARK)
    found = _NUMBER.findall(after if mark else text)
    if not found:
        return None
    try:
        return Decimal((found[0] if mark else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def _comparing(name: str, part: Callable[[str], Any]) -> Metric:
    def score(answer: Answer) -> float:
        given = part(answer.given)
        return float(given is not None and given == part(answer.expected))

    return Metric(name, score, part)


def _group(pattern: str) -> Callable[[str], str | None]:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"pattern={pattern}: is no regular expression: {error}") from error

    def part(text: str) -> str | None:
        found = compiled.search(text)
        if found is None:
            return None
        return (found[1] if compiled.groups else found[0]) or ""

    return part


def _load(word: str, file: Path, name: str) -> Callable[..., Any]:
    if not file.is_file():
        raise ConfigError(f"metric={word}: there is no file {file}")
    spec = importlib.util.spec_from_file_location("finetune_metric", file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"metric={word}: {file} cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"metric={word}: {file} has no function {name}(prompt, expected, given)")
    return function


def _checked(word: str, function: Callable[..., Any]) -> Callable[[Answer], float]:
    def score(answer: Answer) -> float:
        try:
            value = float(function(answer.prompt, answer.expected, answer.given))
        except Exception as error:
            raise ConfigError(
                f"metric={word}: fails on the answer {answer.given[:_SHOWN]!r}: {type(error).__name__}: {error}; it is "
                "called with prompt, expected and given, and gives a number"
            ) from error
        if not math.isfinite(value):
            raise ConfigError(f"metric={word}: gives {value} for the answer {answer.given[:_SHOWN]!r}")
        return value

    return score
