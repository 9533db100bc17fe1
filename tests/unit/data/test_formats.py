"""Every format reads its rows; every bad row is named by what is wrong with it."""

from __future__ import annotations

import pytest

from finetune.data.formats import FORMATS, Message, detect_format, parse_row
from finetune.errors import DataError

USER, ASSISTANT = Message("user", "q"), Message("assistant", "a")
TURNS = [USER.as_dict(), ASSISTANT.as_dict()]


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": TURNS}, "messages", [USER, ASSISTANT]),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [USER, ASSISTANT]),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt_completion", [USER, ASSISTANT]),
        ({"instruction": "q", "output": "a"}, "alpaca", [USER, ASSISTANT]),
        ({"instruction": "q", "input": None, "output": "a"}, "alpaca", [USER, ASSISTANT]),
        ({"instruction": "q", "input": "x", "output": "a"}, "alpaca", [Message("user", "q\nx"), ASSISTANT]),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["u", "v"]]},
            "alpaca",
            [Message("system", "s"), Message("user", "u"), Message("assistant", "v"), USER, ASSISTANT],
        ),
    ],
)
def test_rows_are_recognised_and_read(row, name, messages):
    assert detect_format(frozenset(row), "rows.jsonl") == name
    assert parse_row(row, name) == messages


@pytest.mark.parametrize("columns", [{"text"}, set(), {"messages", "instruction", "output"}])
def test_columns_that_fit_no_format_or_several_are_named(columns):
    with pytest.raises(DataError) as error:
        detect_format(frozenset(columns), "rows.jsonl")
    assert all(column in str(error.value) for column in columns)
    assert "rows.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("row", "name", "complaint"),
    [
        ([1], "messages", "an object, found a list"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hi"}, "messages", "must be a list"),
        ({"messages": ["hi"]}, "messages", r"messages\[0\] must be an object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages", "'bot'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "found null"),
        ({"messages": [USER.as_dict() | {"tool_calls": []}]}, "messages", "tool_calls"),
        ({"prompt": "q"}, "prompt_completion", "lacks completion"),
        ({"prompt": 1, "completion": "a"}, "prompt_completion", "prompt must be text, found a number"),
        ({"instruction": "q", "output": None}, "alpaca", "output must be text"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "alpaca", r"history\[0\] must be a pair"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row, name, complaint):
    assert name in FORMATS
    with pytest.raises(DataError, match=complaint):
        parse_row(row, name)
