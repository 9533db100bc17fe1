"""Metrics score answers."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import get_args

import pytest

from finetune.config.sections import GenerationConfig
from finetune.evaluation.generation import Answer
from finetune.evaluation.metric_names import ANSWER_METRICS
from finetune.evaluation.metrics import METRICS, find_metric, number_in, rouge_l
from finetune.report.curves import QUANTITIES
from finetune.system.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 12 + 30 = 42\n#### 42", 42),
        ("#### 1,234.50 dollars, not 7", "1234.5"),
        ("first 3, then -8.5.", "-8.5"),
        ("it costs $1,000", 1000),
        ("#### -3", -3),
        ("0.50", "0.5"),
        (".5 of it", "0.5"),
        ("#### none", None),
        ("none", None),
    ],
)
def test_the_number_of_a_text(text, number):
    assert number_in(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("metric", "pattern", "expected", "given", "score"),
    [
        ("exact_match", None, "yes", " yes\n", 1),
        ("exact_match", None, "yes", "Yes", 0),
        ("contains", None, "Blue  sky", "the blue sky!", 1),
        ("contains", None, "blue sky", "a blue, clear sky", 0),
        ("token_f1", None, "the cat sat", "Sat, the dog", 2 / 3),
        ("token_f1", None, "a a b", "a", 0.5),
        ("token_f1", None, "yes", "", 0),
        ("rouge_l", None, "the cat sat down", "sat the cat", 4 / 7),
        ("rouge_l", None, "...", "!", 1),
        ("json_valid", None, "", '{"a": [1]}', 1),
        ("json_valid", None, "{}", "{'a': 1}", 0),
        ("json_valid", None, "{}", "[" * 100_000, 0),
        ("number", None, "#### 42", "that makes 42.0", 1),
        ("number", None, "#### 42", "no idea", 0),
        ("regex", r"answer: (\w+)", "answer: red.", "so the answer: red", 1),
        ("regex", r"answer: (\w+)", "answer: red.", "red", 0),
        ("regex", r"[A-D]", "(B)", "B is right", 1),
        ("regex", r"<a>(.*)</a>", "<a>x\ny</a>", "it is <a>x\ny</a>.", 1),
    ],
)
def test_built_in_metrics(metric, pattern, expected, given, score):
    assert find_metric(metric, pattern).scores([Answer("q", expected, given)]).tolist() == pytest.approx([score])


def test_every_name_of_the_config_is_a_metric_and_has_a_curve():
    names = list(get_args(get_args(GenerationConfig.model_fields["metrics"].annotation)[0]))
    assert names == list(METRICS) == list(ANSWER_METRICS)
    for name in names:
        (quantity,) = [q for q in QUANTITIES if re.fullmatch(q.names, f"eval/a/{name}")]
        assert quantity.share


@pytest.mark.parametrize(("given", "expected"), [("a b c a", "c a b"), ("x y", "z"), ("one two three", "one three")])
def test_rouge_l_is_that_of_the_reference_package(given: str, expected: str):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    assert rouge_l(Answer("", expected, given)) == pytest.approx(scorer.score(expected, given)["rougeL"].fmeasure)


def test_a_function_of_the_users_own_file_scores(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def overlap(prompt, expected, given):\n    return len({*given} & {*expected}) / len({*expected})\n"
    )
    metric = find_metric(f"{file}:overlap", None)
    assert metric.name == "overlap"
    assert metric.scores([Answer("", "abcd", "abx"), Answer("", "a", "a")]).tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other(): pass", "has no function score"),
        ("import nowhere_to_be_found", "cannot be run: ModuleNotFoundError"),
        ("def score(a): return 1", "fails on the answer 'x': TypeError"),
        ("def score(*a): return 'good'", "fails on the answer 'x': ValueError"),
        ("def score(*a): return float('nan')", "nan"),
    ],
)
def test_a_function_that_returns_no_number_is_reported_with_its_error(source, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        find_metric(f"{file}:score", None).scores([Answer("q", "y", "x")])


@pytest.mark.parametrize(
    ("word", "pattern", "message"),
    [
        ("regex", None, "pattern: "),
        ("exact_match", "x", "pattern: "),
        ("regex", "(", r"pattern=\("),
        ("f1", None, "f1"),
        ("nowhere.py:f", None, "nowhere.py"),
    ],
)
def test_unknown_metrics_and_wrong_patterns_are_refused(word, pattern, message):
    with pytest.raises(ConfigError, match=message):
        find_metric(word, pattern)


def test_rows_without_a_value_to_compare_are_refused():
    with pytest.raises(DataError, match=r"1 of 2.*'blue'"):
        find_metric("number", None).scores([Answer("", "3", ""), Answer("", "blue", "")])
