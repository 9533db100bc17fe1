"""Formats are recognized by their columns; columns and roles can be mapped; errors name the problem."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.schema import SourceConfig
from finetune.data.formats.conversations import KNOWN_KEYS
from finetune.data.formats.detection import detect_format, resolve_format
from finetune.data.formats.messages import Conversation, Message, Preference, RawText, TokenRow
from finetune.data.formats.parser import FORMATS, RowParser
from finetune.system.errors import DataError

SYSTEM, USER, ASSISTANT = Message("system", "s"), Message("user", "q"), Message("assistant", "a")
CHAT = Conversation((USER, ASSISTANT))
TURNS = [USER.as_dict(), ASSISTANT.as_dict()]


def resolved(row, objective: str = "none", **source) -> RowParser:
    """Build the parser of a source with this first row."""
    cfg = SourceConfig(path="rows.jsonl", **source)
    return RowParser(cfg, resolve_format(cfg, row, "rows.jsonl", objective))


def parse(row, name: str):
    return RowParser(SourceConfig(path="rows.jsonl"), name).parse(row)


PROMPT = Message("user", "q", weight=0.0)
PAIR = Preference(*(Conversation((PROMPT, Message("assistant", answer))) for answer in "ab"))
EXAMPLES = [
    ({"messages": TURNS}, "messages", CHAT),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", CHAT),
    ({"conversation": TURNS}, "sharegpt", CHAT),
    ({"prompt": "q", "completion": "a"}, "prompt_completion", CHAT),
    ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt_completion", CHAT),
    ({"prompt": TURNS[:1], "completion": "a"}, "prompt_completion", CHAT),
    ({"prompt": "q", "completion": TURNS[1:]}, "prompt_completion", CHAT),
    (
        {"prompt": [*TURNS, TURNS[0]], "completion": "a"},
        "prompt_completion",
        Conversation((USER, Message("assistant", "a", weight=0.0), USER, ASSISTANT)),
    ),
    (
        {"prompt": [TURNS[0], TURNS[1] | {"train": True}, TURNS[0]], "completion": "a"},
        "prompt_completion",
        Conversation((USER, ASSISTANT) * 2),
    ),
    ({"prompt": "q"}, "prompt", Conversation((USER,))),
    ({"prompt": TURNS[:1], "system": "s"}, "prompt", Conversation((SYSTEM, USER))),
    *[
        (row, "preference", PAIR)
        for row in (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [TURNS[1] | {"content": "b"}]},
            {"question": "q", "chosen": "a", "rejected": "b", "label": True},
            {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
            {"messages": TURNS[:1], "chosen": TURNS[1], "rejected": "b"},
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            {"prompt": "q", "messages": TURNS, "chosen": TURNS, "rejected": [TURNS[0], TURNS[1] | {"content": "b"}]},
        )
    ],
    ({"instruction": "q", "output": "a"}, "alpaca", CHAT),
    ({"instruction": "q", "input": None, "history": None, "output": "a"}, "alpaca", CHAT),
    ({"instruction": "q", "input": "", "system": "", "history": [], "output": "a"}, "alpaca", CHAT),
    ({"instruction": "", "input": "q", "output": "a"}, "alpaca", CHAT),
    ({"messages": TURNS, "label": True}, "messages", CHAT),
    ({"instruction": "q", "input": "x", "output": "a"}, "alpaca", Conversation((Message("user", "q\nx"), ASSISTANT))),
    (
        {"instruction": "q", "output": "a", "system": "s", "history": [["u", "v"]]},
        "alpaca",
        Conversation((SYSTEM, Message("user", "u"), Message("assistant", "v"), USER, ASSISTANT)),
    ),
    ({"text": "A document.\n"}, "text", RawText("A document.\n")),
    ({"input_ids": [1, 2]}, "tokens", TokenRow((1, 2))),
    # A column of rendered text, in addition to a chat format.
    ({"instruction": "q", "output": "a", "text": "q a"}, "alpaca", CHAT),
    ({"input_ids": [1, 2], "text": "q"}, "tokens", TokenRow((1, 2))),
]


@pytest.mark.parametrize(("row", "name", "example"), EXAMPLES)
def test_rows_are_recognized_and_read(row, name, example):
    objective = "reward" if name == "prompt" else "none"
    parser = resolved(row, objective, format="auto")
    assert parser.format == name
    assert parser.parse(row) == example
    assert resolved(row, format=name).parse(row) == example
    longer = row | {"source": "web", "score": 3}
    assert resolved(longer, objective).parse(longer) == example


def test_every_format_that_a_config_can_name_is_read():
    assert {name for _, name, _ in EXAMPLES} == set(FORMATS)
    assert set(SourceConfig.model_fields["format"].annotation.__args__) == {"auto", *FORMATS}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"riddle", "way"},
            ["fit no format", "columns riddle, way", "prompt_completion: prompt, completion"],
        ),
        (set(), ["columns none fit no format"]),
        ({"messages", "instruction", "output"}, ["fit several formats", "set format to messages or alpaca"]),
        ({"prompt", "chosen"}, ["chosen has no rejected", "columns: {completion: chosen}"]),
        ({"prompt"}, ["fit no format", "columns: {prompt: question, completion: answer}"]),
        ({f"c{i}" for i in range(100)}, ["and 68 more"]),
    ],
)
def test_columns_that_fit_no_format_or_several_are_named(columns, words):
    with pytest.raises(DataError) as error:
        detect_format(frozenset(columns), "rows.jsonl")
    assert [word for word in ["rows.jsonl", *words] if word not in str(error.value)] == []


WITH_SYSTEM = Conversation((SYSTEM, USER, ASSISTANT))
ASKED = Conversation((Message("user", "q!"),))
QA = {"prompt": "question", "completion": "answer"}
# (row, columns, roles, format, example)
MAPPED = [
    ({"question": "q", "answer": "a"}, QA, {}, "prompt_completion", CHAT),
    # A column that has our name by chance gives way, and two names can be swapped.
    ({"prompt": "no", "question": "q", "answer": "a"}, QA, {}, "prompt_completion", CHAT),
    ({"prompt": "a", "answer": "q"}, {"prompt": "answer", "completion": "prompt"}, {}, "prompt_completion", CHAT),
    # The mapped names select one of several formats.
    ({"messages": [], "question": "q", "answer": "a"}, QA, {}, "prompt_completion", CHAT),
    # A mapped column has our name only.
    ({"prompt": "s", "completion": "", "messages": TURNS}, {"system": "prompt"}, {}, "messages", WITH_SYSTEM),
    ({"instruction": "q", "response": "a"}, {"output": "response"}, {}, "alpaca", CHAT),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"completion": "chosen"}, {}, "prompt_completion", CHAT),
    ({"chosen": TURNS, "rejected": []}, {"messages": "chosen"}, {}, "messages", CHAT),
    ({"content": "x"}, {"text": "content"}, {}, "text", RawText("x")),
    (
        {
            "turns": [
                {"who": "customer", "says": "q"},
                {"who": "bot", "says": "a", "trainable": False},
                {"who": "user", "says": "q"},
                {"who": "agent", "says": "a"},
            ]
        },
        {"messages": "turns", "role": "who", "content": "says", "train": "trainable"},
        {"user": "customer", "assistant": ["agent", "bot"]},
        "messages",
        Conversation((USER, Message("assistant", "a", weight=0.0), USER, ASSISTANT)),
    ),
    (
        {"conversations": [{"speaker": "human", "text": "q"}, {"speaker": "gpt", "text": "a"}]},
        {"from": "speaker", "value": "text"},
        {},
        "sharegpt",
        CHAT,
    ),
    ({"messages": [TURNS[0] | {"text": "q!", "value": "no"}]}, {"content": "text"}, {}, "messages", ASKED),
    ({"messages": [TURNS[0] | {"score": 3}, TURNS[1]]}, {"id": "score"}, {}, "messages", CHAT),
    (
        {"messages": [{"role": "assistant", "content": "q"}, {"role": "user", "content": "a"}]},
        {},
        {"user": "assistant", "assistant": "user"},
        "messages",
        CHAT,
    ),
    ({"prompt": [{"role": "Q", "content": "q"}], "completion": "a"}, {}, {"user": "Q"}, "prompt_completion", CHAT),
]


@pytest.mark.parametrize(("row", "columns", "roles", "name", "example"), MAPPED)
def test_columns_and_roles_can_be_mapped(row, columns, roles, name, example):
    parser = resolved(row, columns=columns, roles=roles)
    assert parser.format == name
    assert parser.parse(row) == example
    assert pickle.loads(pickle.dumps(parser)).parse(row) == example  # noqa: S301 - made here


MISMAPPED = [
    ({"q": "q"}, {"columns": {"prompt": "question"}}, "lacks question, which columns maps to prompt; its columns: q"),
    ({"q": "q"}, {"columns": {"promt": "q"}}, "columns maps promt", "completion", "messages", "input_ids"),
    ({"text": "q"}, {"columns": {"prompt": "text"}, "format": "text"}, "maps prompt, which text rows", "one of text"),
    ({"text": "q"}, {"columns": {"role": "who"}, "format": "alpaca"}, "maps role, which alpaca rows", "input"),
    ({"text": "q"}, {"columns": {"role": "who"}}, "fit no format"),
    ({"text": "q"}, {"columns": {"id": "x"}, "format": "text"}, "maps id, which text rows"),
    ({"instruction": "q", "output": "a"}, {"roles": {"user": "human"}}, "alpaca", "remove roles"),
    ([1], {}, "must be an object, found a list"),
    (None, {}, "must be an object, found null"),
]


@pytest.mark.parametrize(("row", "source", "words"), [(row, source, words) for row, source, *words in MISMAPPED])
def test_an_impossible_mapping_is_one_error_of_the_source(row, source, words):
    with pytest.raises(DataError) as error:
        resolved(row, **source)
    assert [word for word in ["rows.jsonl", *words] if word not in str(error.value)] == []


def test_errors_use_the_files_name_of_a_mapped_column():
    parser = resolved({"question": "q", "answer": "a"}, columns=QA)
    with pytest.raises(DataError, match="answer must be text, found null"):
        parser.parse({"question": "q", "answer": None})
    with pytest.raises(DataError, match="lacks answer, which columns maps to completion; its columns: question"):
        parser.parse({"question": "q"})


HOSTILE = [
    ([1], "messages", "must be an object, found a list"),
    ("x", "text", "must be an object, found text"),
    ({"prompt": "q"}, "prompt_completion", "lacks completion, which prompt_completion rows need; its columns: prompt"),
    ({}, "alpaca", "lacks instruction, output", "its columns: none"),
    ({"prompt": {"a": 1}, "completion": "a"}, "prompt_completion", "prompt must be text, found an object"),
    ({"prompt": "q", "completion": None}, "prompt_completion", "completion must be text, found null"),
    ({"prompt": [], "completion": "a"}, "prompt_completion", "prompt must be a list of at least one message"),
    ({"prompt": [{"role": "user"}], "completion": "a"}, "prompt_completion", "prompt[0].content is missing"),
    ({"prompt": TURNS, "completion": TURNS[1:]}, "prompt_completion", "prompt[1] and completion[0]"),
    ({"prompt": [TURNS[1]], "completion": [TURNS[0]]}, "prompt_completion", "prompt[0] is the only answer"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "preference", "rejected is empty"),
    ({"prompt": "q", "chosen": "a"}, "preference", "lacks rejected"),
    ({"chosen": "a", "rejected": "b"}, "preference", "no prompt"),
    ({"prompt": "q", "question": "r", "chosen": "a", "rejected": "b"}, "preference", "prompt, question", "keep one"),
    ({"chosen": TURNS, "rejected": TURNS}, "preference", "chosen and rejected are equal"),
    ({"prompt": "q", "chosen": TURNS, "rejected": "b"}, "preference", "chosen holds a whole conversation"),
    ({"chosen": TURNS, "rejected": [TURNS[0] | {"content": "r"}, TURNS[1]]}, "preference", "same prompt"),
    ({"chosen": TURNS, "rejected": TURNS[:1]}, "preference", "end both sides with an answer"),
    ({"prompt": TURNS, "chosen": "b", "rejected": "c"}, "preference", "prompt[1] is of the assistant"),
    ({"prompt": [SYSTEM.as_dict(), *TURNS[:1]], "system": "s", "chosen": "a", "rejected": "b"}, "preference", "both"),
    ({"prompt": "q", "completion": "a", "chosen": "b"}, "prompt_completion", "chosen and rejected"),
    ({"instruction": "q", "output": None}, "alpaca", "output must be text, found null"),
    ({"instruction": None, "output": "a"}, "alpaca", "instruction must be text, found null"),
    ({"instruction": "q", "input": {"a": 3}, "output": "a"}, "alpaca", "input must be text", "data.on_object=json"),
    ({"instruction": "q\0", "output": "a"}, "alpaca", "instruction holds a NUL character (character 2)"),
    ({"instruction": "q", "output": "\udc00"}, "alpaca", "output", "surrogate", "character 1"),
    ({"instruction": "q", "output": "a", "history": "x"}, "alpaca", "history must be a list of pairs", "found text"),
    ({"instruction": "q", "output": "a", "history": ["x"]}, "alpaca", "history[0] must be a pair of texts, found text"),
    ({"instruction": "q", "output": "a", "history": [["x"]]}, "alpaca", "history[0] must be a pair of texts"),
    ({"instruction": "q", "output": "a", "history": [["x", None]]}, "alpaca", "history[0][1] must be text, found null"),
    ({"instruction": "q", "output": "a", "images": ["x"]}, "alpaca", "images: file 1 of 1 has no tag"),
    ({"text": ""}, "text", "text is empty"),
    ({"text": None}, "text", "text must be text, found null"),
    ({"text": 3}, "text", "text must be text, found a number"),
    ({"text": "\ud83d"}, "text", "text holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "name", "words"), [(row, name, words) for row, name, *words in HOSTILE])
def test_the_error_of_a_bad_row_names_column_and_problem(row, name, words):
    with pytest.raises(DataError) as error:
        parse(row, name)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("file", "name", "kind", "count"),
    [
        ("alpaca_en_demo.json", "alpaca", Conversation, 999),
        ("identity.json", "alpaca", Conversation, 91),
        ("c4_demo.jsonl", "text", RawText, 300),
    ],
)
def test_the_demo_rows_of_other_trainers_are_all_read(shared, file, name, kind, count):
    content = (shared / "datasets/formats" / file).read_text(encoding="utf-8")
    rows = json.loads(content) if file.endswith(".json") else [json.loads(line) for line in content.splitlines()]
    parser = resolved(rows[0])
    assert parser.format == name
    assert Counter(type(parser.parse(row)) for row in rows) == {kind: count}


@pytest.mark.parametrize(("file", "count"), [("train.jsonl", 7473), ("test.jsonl", 1319)])
def test_gsm8k_is_read_with_a_mapping(shared, file, count):
    lines = (shared / "datasets/gsm8k" / file).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    parser = resolved(rows[0], columns=QA)
    assert [parser.parse(row) for row in rows] == [
        Conversation((Message("user", row["question"]), Message("assistant", row["answer"]))) for row in rows
    ]
    assert len(rows) == count


def test_parsing_rows_takes_no_heavy_import():
    heavy = ("torch", "transformers", "datasets", "pandas", "pyarrow")
    code = f"import sys, finetune.data.formats.parser; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


RICH = [
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q"}], "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "3", "tool_call_id": "1"},
            {"role": "assistant", "content": "a", "train": True, "weight": 2, "function_call": None},
        ],
        "tools": [{"name": "f", "parameters": {"type": "object"}}],
    },
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": [{"name": "f", "arguments": {"x": [1]}}]},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "a"},
        ],
        "system": "s",
        "tools": "[]",
    },
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [0, 1, 1], "position_ids": [0, 0, 1]},
    *(row for row, _, _ in EXAMPLES),
]
hostile_text = st.text(st.sampled_from('aé"\\\n\0\ud800{}[]'), max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | hostile_text
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile_text, inner, max_size=3), max_leaves=8
)


def slots(value):
    """Yield (container, key) of everything inside a row."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from slots(item)


@st.composite
def spoilt(draw):
    """Draw a valid row with some parts replaced, removed or added."""
    row = copy.deepcopy(draw(st.sampled_from(RICH)))
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(list(slots(row)) or [(row, "text")]))
        if draw(st.booleans()):
            container[key] = draw(anything)
        elif isinstance(container, dict):
            container.pop(key, None)
            container[draw(st.sampled_from([*sorted(KNOWN_KEYS), "chosen", "label", "images", "thinking"]))] = draw(
                anything
            )
    return row


@given(st.sampled_from(sorted(FORMATS)), spoilt() | anything)
@settings(max_examples=500)
def test_a_row_of_any_content_is_at_worst_a_bad_row(name, row):
    fitting = [fmt for fmt in FORMATS if isinstance(row, dict) and FORMATS[fmt].is_in(frozenset(row))]
    try:
        example = parse(row, *(fitting or [name])[:1])
    except DataError as error:
        assert len(str(error)) < 800
        assert str(error).isprintable()
    else:
        assert isinstance(example, Conversation | Preference | RawText | TokenRow)


@pytest.mark.parametrize(("column", "keys"), [("messages", ("role", "content")), ("conversations", ("from", "value"))])
def test_messages_may_be_json_text_as_in_a_csv_file(column, keys):
    turns = [dict(zip(keys, turn, strict=True)) for turn in (("user", "hi"), ("assistant", "ho"))]
    parser = RowParser(SourceConfig(path="x"), "messages" if column == "messages" else "sharegpt")
    assert parser.parse({column: json.dumps(turns)}) == parser.parse({column: turns})
