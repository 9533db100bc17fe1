"""Rewards judge answers as their formulas and TRL say; what a function does wrong is named with the answer."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.sections import RewardConfig
from finetune.evaluation.generation import Answer
from finetune.evaluation.metrics import METRICS
from finetune.objectives.prompts import Prompt
from finetune.objectives.rewards import (
    SampledAnswers,
    build_rewards,
    check_prompts,
)
from finetune.objectives.user_rewards import load_reward_function, user_rewards
from finetune.system.errors import ConfigError, DataError


def answers(
    *texts: str, expected: tuple[str, ...] = (), ids: list[list[int]] | None = None, **columns
) -> SampledAnswers:
    return SampledAnswers(
        prompts=[[{"role": "user", "content": f"question {i}"}] for i in range(len(texts))],
        texts=list(texts),
        ids=ids or [[1, 2] for _ in texts],
        expected=list(expected) or ["" for _ in texts],
        columns={name: list(values) for name, values in columns.items()},
    )


def config(*names: str, **options) -> RewardConfig:
    return RewardConfig(loss="grpo", functions={name: 1.0 for name in names}, **options)


def scores(cfg: RewardConfig, given: SampledAnswers) -> list[float]:
    return build_rewards(cfg).judge(given)[:, 0].tolist()


def judge(function: Any, given: SampledAnswers | None = None) -> list[float]:
    return build_rewards(RewardConfig(loss="grpo"), function).judge(given or answers("a", "b"))[:, 0].tolist()


# --- named rewards


def test_exact_ignores_outer_white_space_alone():
    assert scores(config("exact"), answers(" 4\n", "4 .", "", expected=("4", "4", "4"))) == [1, 0, 0]


@pytest.mark.parametrize("text", ["so 4.0", "#### 4\nor 5", "four", "1,004", "3"])
def test_number_is_the_metric_of_this_name(text):
    expected = METRICS["number"].score(Answer("", "work #### 4", text))
    assert scores(config("number"), answers(text, expected=("work #### 4",))) == [expected]


def test_regex_compares_group_1_of_both_texts():
    cfg = config("regex", pattern=r"<answer>(.*?)</answer>")
    given = answers("<answer>a\nb</answer>", "a\nb", expected=("so <answer>a\nb</answer>",) * 2)
    assert scores(cfg, given) == [1, 0]


def test_json_schema_wants_one_valid_value_and_never_downloads(tmp_path):
    file = tmp_path / "schema.json"
    schema = {"type": "object", "required": ["name"], "properties": {"age": {"type": "integer"}}}
    file.write_text(json.dumps(schema))
    texts = ['{"name": "A", "age": 3}', ' {"name": 1}\n', '{"age": 3}', '{"name": "A", "age": "3"}']
    bad = ['{"name": "A"} {}', '```json\n{"name": "A"}\n```', "", "[" * 100_000, '{"name": NaN}']
    assert scores(config("json_schema", json_schema=str(file)), answers(*texts, *bad)) == [1, 1, 0, 0, *[0] * len(bad)]


def test_a_reference_to_a_schema_elsewhere_is_refused_before_the_run(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"properties": {"a": {"$ref": "http://127.0.0.1:9/other.json"}}}))
    with pytest.raises(ConfigError, match=r"reward\.json_schema.*127\.0\.0\.1"):
        build_rewards(config("json_schema", json_schema=str(file)))


@pytest.mark.parametrize("content", [None, "{", '{"type": 3}', "[]"])
def test_a_file_that_is_no_schema_is_named(tmp_path, content):
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"reward\.json_schema: .*schema\.json"):
        build_rewards(config("json_schema", json_schema=str(file)))


def test_length_is_the_formula_of_dapo():
    """Equation 13 of arXiv:2503.14476, with L_max = max_new_tokens and L_cache = max_new_tokens - length."""
    longest, start = 40, 25
    cache = longest - start

    def formula(tokens: int) -> float:
        if tokens <= longest - cache:
            return 0.0
        return (longest - cache - tokens) / cache if tokens <= longest else -1.0

    ids = [[0] * tokens for tokens in range(1, 45)]
    given = answers(*("" for _ in ids), ids=ids)
    found = scores(config("length", length=start, max_new_tokens=longest), given)
    assert found == pytest.approx([formula(len(each)) for each in ids])
    assert found[start - 1] == 0 and found[start] == pytest.approx(-1 / 15) and found[longest - 1] == -1


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think>4", 1),
        ("<think>\na\n</think>\n\n4\n5", 1),
        (" <think>a</think>4", 0),
        ("<think>a", 0),
        ("a</think>4", 0),
        ("<think>a<think>b</think>4", 0),
        ("<think>a</think>4<think>", 0),
        ("4", 0),
    ],
)
def test_format_wants_reasoning_in_one_pair_of_tags_first(text, reward):
    assert scores(config("format"), answers(text)) == [reward]


def test_an_own_format_matches_the_whole_answer_over_several_lines():
    cfg = config("format", format=r"<a>.*</a>")
    assert scores(cfg, answers("<a>1\n2</a>", "<a>1</a>\n", "so <a>1</a>")) == [1, 0, 0]


# --- TRL's functions, unchanged


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", " "]), max_size=8))
def test_trls_format_reward_equals_ours_and_its_own_pattern(parts):
    text = "".join(parts)
    given = answers(text)
    trl = load_reward_function("trl.rewards:think_format_reward")
    pattern = re.compile(r"<think>(?!.*<think>).*?</think>.*", re.DOTALL)
    assert judge(trl, given) == scores(config("format"), given) == [float(bool(pattern.fullmatch(text)))]


def test_trls_functions_on_tokens_run_unchanged():
    from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

    given = answers("", "", "", ids=[[5] * 5, [1, 2, 3, 4], [1] * 90])
    assert judge(get_repetition_penalty_reward(ngram_size=2), given) == [-0.75, 0, pytest.approx(-88 / 89)]
    assert judge(get_soft_overlong_punishment(100, 20), given) == [0, 0, -0.5]


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math_verify is not installed")
def test_trls_accuracy_reward_runs_unchanged():
    given = answers(r"\boxed{\frac{1}{3}}", r"\boxed{2}", expected=(r"\frac{1}{3}",) * 2)
    assert judge(load_reward_function("trl.rewards:accuracy_reward"), given) == [1, 0]


# --- what a function gets and gives


def test_a_function_gets_what_trl_gives():
    seen: dict[str, Any] = {}

    def score(prompts, completions, completion_ids, solution, level, **columns):
        seen.update(locals())
        return [1.0, None]

    given = answers("a", "b", expected=("x", "y"), ids=[[1], [2, 3]], level=[1, 2], prompt=["p", "q"], messages=[1, 2])
    assert judge(score, given) == [1, 0], "None: the reward does not apply"
    assert seen["prompts"] == given.prompts
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in "ab"]
    assert (seen["completion_ids"], seen["solution"], seen["level"]) == ([[1], [2, 3]], ["x", "y"], [1, 2])
    assert seen["columns"] == {"messages": [1, 2]}, "prompt is reserved, as in TRL"


def test_a_column_solution_wins_over_the_answer_of_the_row():
    given = answers("a", "b", expected=("x", "y"), solution=[["any", "value"], None])
    assert judge(lambda solution, **_: [len(solution[0]), solution[1] == "y"], given) == [2, 1]


def test_a_function_cannot_change_what_others_see():
    def spoil(prompts, completions, completion_ids, solution, level, **_):
        for each in (completions, completion_ids, solution, level):
            each.clear()
        for prompt in prompts:
            prompt[0]["content"] = ""
            prompt.clear()
        return [0, 0]

    given = answers("a", "b", level=[1, 2])
    rewards = build_rewards(config("exact"), [spoil, lambda prompts, level, **_: level])
    assert rewards.judge(given)[:, 2].tolist() == [1, 2]
    assert given.prompts[0] == [{"role": "user", "content": "question 0"}]


def test_rewards_are_weighed_in_the_sum_alone():
    def score(**_):
        return [2, -1]

    rewards = build_rewards(RewardConfig(loss="grpo", functions={"exact": 0.5}), score)
    judged = rewards.judge(answers("4", "5", expected=("4", "4")))
    assert (rewards.names, rewards.weights) == (("exact", "score"), (0.5, 1.0))
    assert judged.dtype == np.float64
    assert judged.tolist() == [[1, 2], [0, -1]]
    assert rewards.total(judged).tolist() == [2.5, -1]


@pytest.mark.parametrize(
    "returned",
    [(1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5]), [np.float32(1), torch.tensor(2.5)], [True, Fraction(5, 2)]],
    ids=["tuple", "array", "tensor", "scalars", "numbers"],
)
def test_every_kind_of_number_counts(returned):
    assert judge(lambda **_: returned) == [1, 2.5]


def score(completions, **_):
    return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1, math.nan], ["finite number", "nan", "'b'", "'question 1'"]),
        ([math.inf, 1], ["inf", "'a'", "'question 0'"]),
        ([10**400, 1], ["finite number"]),
        (["1", 1], ["finite number", "'1'"]),
        ([[1], 1], ["finite number"]),
        ([1], ["one number per answer", "1 for 2"]),
        (None, ["list of numbers", "NoneType"]),
        (1.0, ["list of numbers", "float"]),
        ({"a": 1, "b": 2}, ["list of numbers", "dict"]),
    ],
)
def test_a_wrong_result_is_named_with_its_answer(returned, words):
    def wrong(**_):
        return returned

    with pytest.raises(ConfigError) as error:
        judge(wrong)
    assert [word for word in ["reward_function", ":wrong", *words] if word not in str(error.value)] == []


def test_an_error_in_a_function_names_the_answer_that_causes_it():
    def fails(completions, **_):
        return [1 / (completion[0]["content"] != "b" * 500) for completion in completions]

    with pytest.raises(ConfigError) as error:
        judge(fails, answers("a", "b" * 500))
    message = str(error.value)
    assert all(word in message for word in (":fails", "ZeroDivisionError: division by zero", "'question 1'", "'bbb"))
    assert "test_rewards.py:" in message
    assert "b" * 200 not in message
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_error_of_a_batch_alone_names_its_first_answer():
    def fails(completions, **_):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0]

    with pytest.raises(ConfigError, match=r"'a' to 'question 0'.*RuntimeError: too many"):
        judge(fails)


# --- functions by their words


def write(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text(text)
    return str(folder / "mine.py")


def test_a_file_is_loaded_with_its_digest(tmp_path):
    text = (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    b: int\ndef score(completions, **_): return [3]\n"
    )
    file = write(tmp_path, text)
    found = load_reward_function(f"{file}:score")
    assert (found.name, found.word, judge(found, answers("a"))) == ("score", f"{file}:score", [3])
    changed = load_reward_function(f"{write(tmp_path, text + '#')}:score")
    assert None is not found.digest != changed.digest is not None


@pytest.mark.parametrize(
    ("word", "text", "words"),
    [
        ("score", "", ["FILE.py:NAME", "found score"]),
        ("{folder}/none.py:score", "", ["none.py does not exist"]),
        ("{file}:other", "def score(**_): ...", ["no function other", "score"]),
        ("{file}:score", "score = 3", ["no function score, found int"]),
        ("{file}:score", "import not_a_module_of_anyone", ["cannot be run", "ModuleNotFoundError"]),
        ("{file}:score", "def score(:", ["cannot be run", "SyntaxError"]),
        ("{file}:score", "raise SystemExit(3)", ["cannot be run", "SystemExit"]),
        ("{file}:score", "async def score(**_): ...", ["async"]),
        ("{file}:score", "class A:\n    async def __call__(self, **_): ...\nscore = A()", ["async"]),
        ("{file}:score", "def score(completions): ...", ["takes no **columns"]),
        ("not_a_module_of_anyone:score", "", ["cannot import", "ModuleNotFoundError"]),
        ("trl.rewards:not_there", "", ["no function not_there"]),
    ],
)
def test_a_function_that_cannot_be_used_is_named(tmp_path, word, text, words):
    word = word.format(folder=tmp_path, file=write(tmp_path, text))
    with pytest.raises(ConfigError) as error:
        load_reward_function(word)
    assert [part for part in ["reward_function", *words] if part not in str(error.value)] == []


def test_python_functions_get_their_names_and_the_word_that_loads_them():
    partial = functools.partial(score, extra=1)
    inner, wrapped, nameless = user_rewards([score])[0], user_rewards(partial)[0], user_rewards([lambda **_: []])[0]
    assert (inner.name, inner.word) == ("score", f"{__file__}:score")
    assert load_reward_function(inner.word).digest == inner.digest is not None
    assert (wrapped.name, wrapped.word) == ("score", "FILE.py:score")
    assert nameless.name == "<lambda>"


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ([score, score], "two functions are called score"),
        (["mine.py:score"], "expected a function, found str"),
        ("mine.py:score", "expected a function, found str"),
        ([3], "expected a function, found int"),
    ],
)
def test_what_is_no_function_is_refused(functions, words):
    with pytest.raises(ConfigError, match=words):
        user_rewards(functions)


def test_a_function_cannot_bear_the_name_of_a_named_reward():
    def exact(**_): ...

    with pytest.raises(ConfigError, match="exact"):
        build_rewards(config("exact"), exact)


# --- rows


@pytest.mark.parametrize(
    ("cfg", "texts", "bad"),
    [
        (config("exact"), ["4", "", " "], 2),
        (config("number"), ["so 4", "four", ""], 2),
        (config("regex", pattern="<(.)>"), ["<a>", "a"], 1),
        (config("exact", "number"), ["4", "four"], 1),
    ],
)
def test_rows_with_nothing_to_compare_with_are_counted(cfg, texts, bad):
    rows = [Prompt([], text, {}, f"rows.jsonl:{i}") for i, text in enumerate(texts, 1)]
    with pytest.raises(DataError, match=rf"{bad} of {len(texts)} rows.*rows\.jsonl:2"):
        check_prompts(build_rewards(cfg), rows)


def test_rows_that_all_have_an_answer_pass_and_other_rewards_need_none():
    rows = [Prompt([], "4", {}, "a:1"), Prompt([], "", {"solution": "5"}, "a:2")]
    check_prompts(build_rewards(config("exact", "number")), rows)
    check_prompts(build_rewards(config("format"), score), [Prompt([], "", {}, "a:1")])


def test_a_column_that_no_row_has_is_named():
    rewards = build_rewards(RewardConfig(loss="grpo"), lambda completions, level, **_: level)
    check_prompts(rewards, [Prompt([], "", {}, "a:1"), Prompt([], "", {"level": 1}, "a:2")])
    with pytest.raises(ConfigError, match=r"'level'(.|\n)*completion_ids, completions, prompts, size, solution"):
        check_prompts(rewards, [Prompt([], "", {"size": 1, "prompt": "p"}, "a:1")])
