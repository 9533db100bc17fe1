"""Metrics of an answer: named ones, equal part by a pattern, or a user's function."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evaluation.generation import Answer
from finetune.evaluation.metric_names import ANSWER_METRICS
from finetune.evaluation.options import pattern_problem
from finetune.system.errors import ConfigError, DataError

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")
_WORD = re.compile(r"\w+")
_GSM8K_MARK = "####"
_SHOWN = 60


@dataclass(frozen=True)
class Metric:
    """name: in tables. score: of one answer. part: extracts what is compared from a text; None if it finds nothing."""

    name: str
    score: Callable[[Answer], float]
    part: Callable[[str], Any] | None = None

    def scores(self, answers: Sequence[Answer]) -> np.ndarray:
        """Return the scores [R] float64.

        Raises:
            DataError: expected answers of rows have nothing to compare.
            ConfigError: a user's function fails or returns no finite number.
        """
        expected = [answer.expected for answer in answers]
        if self.part is not None and (empty := [text for text in expected if self.part(text) is None]):
            raise DataError(
                f"metric={self.name}: no value in {len(empty):,} of {len(answers):,} expected answers, first in "
                f"{empty[0][:_SHOWN]!r}\nhelp: choose another metric or other rows"
            )
        return np.array([self.score(answer) for answer in answers], dtype=np.float64)


def find_metric(word: str, pattern: str | None) -> Metric:
    """Return a metric of METRICS, `regex` with its pattern, or `FILE.py:FUNCTION`.

    Security: the file is run, so the word must come from the command line, never from a config or data.

    Raises:
        ConfigError: there is no such metric.
    """
    if problem := pattern_problem(word, pattern):
        raise ConfigError(problem)
    if word == "exact":
        raise ConfigError("metric=exact: renamed; pass metric=exact_match")
    if word in METRICS:
        return METRICS[word]
    if pattern is not None:
        return _comparing("regex", _group(pattern))
    file, found, name = word.rpartition(":")
    if not found or not file.endswith(".py"):
        raise ConfigError(f"metric: unknown, found {word}; choose {', '.join(METRICS)}, regex, or FILE.py:FUNCTION")
    return Metric(name, _user_function(word, Path(file).expanduser(), name))


def number_in(text: str) -> Decimal | None:
    """Return the number after `####` (the format of GSM8K), else the last number of the text; None without one."""
    _, mark, after = text.rpartition(_GSM8K_MARK)
    found = _NUMBER.findall(after if mark else text)
    try:
        return Decimal((found[0] if mark else found[-1]).replace(",", ""))
    except (IndexError, InvalidOperation):
        return None


def token_f1(answer: Answer) -> float:
    """Return the F1 score of the words that both texts have, in [0, 1]. Source: SQuAD, arXiv:1606.05250."""
    given, expected = _words(answer.given), _words(answer.expected)
    return _f1((Counter(given) & Counter(expected)).total(), len(given), len(expected))


def rouge_l(answer: Answer) -> float:
    """Return the F1 score of the longest common subsequence of words, in [0, 1]. Source: Lin 2004, W04-1013."""
    given, expected = _words(answer.given), _words(answer.expected)
    lengths = [0] * (len(expected) + 1)  # of the common subsequence with each beginning of `expected`
    for word in given:
        before = lengths.copy()
        for i, other in enumerate(expected):
            lengths[i + 1] = before[i] + 1 if word == other else max(lengths[i], before[i + 1])
    return _f1(lengths[-1], len(given), len(expected))


def contains(answer: Answer) -> float:
    """Return 1 if the answer contains the expected text, ignoring case and runs of white space."""
    given, expected = (" ".join(text.casefold().split()) for text in (answer.given, answer.expected))
    return float(expected in given)


def json_valid(answer: Answer) -> float:
    """Return 1 if the answer is one JSON value; the expected answer is not looked at."""
    try:
        json.loads(answer.given)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _f1(common: int, given: int, expected: int) -> float:
    """Return the harmonic mean of precision and recall; two empty texts are equal."""
    return 2 * common / (given + expected) if given + expected else 1.0


def _comparing(name: str, part: Callable[[str], Any]) -> Metric:
    def score(answer: Answer) -> float:
        given = part(answer.given)
        return float(given is not None and given == part(answer.expected))

    return Metric(name, score, part)


METRICS = {
    "exact_match": Metric(ANSWER_METRICS["exact_match"], lambda answer: float(answer.exact)),
    "contains": Metric(ANSWER_METRICS["contains"], contains),
    "number": _comparing(ANSWER_METRICS["number"], number_in),
    "token_f1": Metric(ANSWER_METRICS["token_f1"], token_f1),
    "rouge_l": Metric(ANSWER_METRICS["rouge_l"], rouge_l),
    "json_valid": Metric(ANSWER_METRICS["json_valid"], json_valid),
}


def _group(pattern: str) -> Callable[[str], str | None]:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"pattern={pattern}: invalid regular expression: {error}") from error

    def part(text: str) -> str | None:
        found = compiled.search(text)
        return found and ((found[1] if compiled.groups else found[0]) or "")

    return part


def _user_function(word: str, file: Path, name: str) -> Callable[[Answer], float]:
    if not file.is_file():
        raise ConfigError(f"metric={word}: the file {file} does not exist")
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

    def score(answer: Answer) -> float:
        try:
            value = float(function(answer.prompt, answer.expected, answer.given))
        except Exception as error:
            raise ConfigError(
                f"metric={word}: fails on the answer {answer.given[:_SHOWN]!r}: {type(error).__name__}: {error}\n"
                "help: define FUNCTION(prompt, expected, given) that returns a number"
            ) from error
        if not math.isfinite(value):
            raise ConfigError(f"metric={word}: returns {value} for the answer {answer.given[:_SHOWN]!r}")
        return value

    return score
