"""Messages of OpenAI and ShareGPT: every spelling is read, every bad row is named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.schema import SourceConfig
from finetune.data.formats.messages import Conversation, Message, ToolCall
from finetune.data.formats.parser import RowParser, messages_row
from finetune.data.formats.rules import RowRules
from finetune.system.errors import DataError

SYSTEM, USER, ASSISTANT = Message("system", "s"), Message("user", "q"), Message("assistant", "a")
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CALL = {"name": "add", "arguments": {"x": 1}}
WITH_CALL = Message("assistant", "", (ToolCall("add", {"x": 1}),))
WITH_EMPTY_CALL = Message("assistant", "", (ToolCall("add", {}),))
STRICT = RowRules(turn_order="strict")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def parse(row, name: str = "messages", system: str | None = None, rules: RowRules | None = None, **source):
    return RowParser(SourceConfig(path="rows.jsonl", **source), name, system, rules or RowRules()).parse(row)


def messages(*turns) -> tuple[Message, ...]:
    """Parse turns in OpenAI's format."""
    return parse({"messages": list(turns)}).messages


def sharegpt(*turns) -> tuple[Message, ...]:
    return parse({"conversations": list(turns)}, "sharegpt").messages


def calling(**fields) -> dict:
    return {"role": "assistant", "content": None, **fields}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"role": "system", "content": "s"}, Q, A], (SYSTEM, USER, ASSISTANT)),
        ([{"role": "developer", "content": "s"}, Q, A], (SYSTEM, USER, ASSISTANT)),
        ([{"role": "system", "content": ""}, Q, A], (Message("system", ""), USER, ASSISTANT)),
        ([Q, Q, A, A], (USER, USER, ASSISTANT, ASSISTANT)),
        ([Q | {"content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]}], (Message("user", "q!"),)),
        ([Q | {"content": []}], (Message("user", ""),)),
        ([Q | {"name": "Ann", "id": 7, "timestamp": 1.5, "audio": None, "reasoning": "", "images": []}], (USER,)),
        ([Q, A | {"tool_calls": [], "function_call": None}], (USER, ASSISTANT)),
        ([Q, calling(tool_calls=[CALL])], (USER, WITH_CALL)),
        ([Q, calling(tool_calls=[{"id": "1", "type": "function", "function": CALL}])], (USER, WITH_CALL)),
        ([Q, calling(tool_calls=[CALL | {"arguments": '{"x": 1}'}])], (USER, WITH_CALL)),
        ([Q, calling(tool_calls=json.dumps([CALL]))], (USER, WITH_CALL)),
        ([Q, {"role": "assistant", "tool_calls": [CALL]}], (USER, WITH_CALL)),
        ([Q, calling(function_call=CALL | {"arguments": '{"x": 1}'})], (USER, WITH_CALL)),
        ([Q, A, {"role": "tool", "content": "3", "tool_call_id": "1"}], (USER, ASSISTANT, Message("tool", "3"))),
        (
            [Q, calling(tool_calls=[CALL | {"arguments": " "}])],
            (USER, Message("assistant", "", (ToolCall("add", {}),))),
        ),
        (
            [Q, calling(tool_calls=[CALL | {"arguments": None}])],
            (USER, Message("assistant", "", (ToolCall("add", {}),))),
        ),
        ([Q, A, {"role": "tool", "content": None}], (USER, ASSISTANT, Message("tool", ""))),
        ([Q, A | {"loss": False}], (USER, Message("assistant", "a", weight=0.0))),
        ([Q, A | {"loss": True, "loss_weight": 2}], (USER, Message("assistant", "a", weight=2.0))),
        ([Q, A | {"content": 4}], (USER, Message("assistant", "4"))),
        ([Q, A | {"content": True}], (USER, Message("assistant", "true"))),
        ([Q | {"role": "Human"}, A | {"role": " AI "}], (USER, ASSISTANT)),
        ([Q | {"role": "USER"}, A | {"role": "bot"}], (USER, ASSISTANT)),
        ([Q, A, {"role": "Tool Result", "content": "3"}], (USER, ASSISTANT, Message("tool", "3"))),
        (
            [Q, calling(function_call=CALL), {"role": "function", "name": "add", "content": "3"}, A],
            (USER, WITH_CALL, Message("tool", "3"), ASSISTANT),
        ),
        ([Q, A | {"train": False}], (USER, Message("assistant", "a", weight=0.0))),
        ([Q, A | {"train": True}], (USER, ASSISTANT)),
        ([Q, A | {"train": None, "weight": None}], (USER, ASSISTANT)),
        ([Q, A | {"weight": 0}], (USER, Message("assistant", "a", weight=0.0))),
        ([Q, A | {"weight": 0.5, "train": True}], (USER, Message("assistant", "a", weight=0.5))),
        ([Q, A | {"weight": 0, "train": False}], (USER, Message("assistant", "a", weight=0.0))),
    ],
)
def test_openai_messages_are_read(turns, expected):
    assert messages(*turns) == expected


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"from": "system", "value": "s"}, HUMAN, GPT], (SYSTEM, USER, ASSISTANT)),
        ([HUMAN | {"from": "user"}, GPT | {"from": "assistant"}], (USER, ASSISTANT)),
        ([HUMAN, GPT | {"from": "chatgpt"}, HUMAN, GPT | {"from": "bing"}], (USER, ASSISTANT, USER, ASSISTANT)),
        ([Q, GPT], (USER, ASSISTANT)),
        ([HUMAN | {"role": None, "content": None}, GPT | {"weight": 1}], (USER, ASSISTANT)),
        ([HUMAN, {"from": "function_call", "value": json.dumps(CALL)}], (USER, WITH_CALL)),
        ([HUMAN, {"from": "function_call", "value": CALL}], (USER, WITH_CALL)),
        (
            [HUMAN, {"from": "function_call", "value": [CALL, CALL]}],
            (USER, Message("assistant", "", WITH_CALL.tool_calls * 2)),
        ),
        # Text and calls that a model writes in one turn stay one turn.
        (
            [HUMAN, GPT, {"from": "function_call", "value": CALL}, {"from": "function_call", "value": CALL}],
            (USER, Message("assistant", "a", WITH_CALL.tool_calls * 2)),
        ),
        (
            [HUMAN, GPT | {"train": False}, {"from": "function_call", "value": CALL}],
            (USER, Message("assistant", "a", weight=0.0), WITH_CALL),
        ),
        (
            [HUMAN, {"from": "function_call", "value": CALL}, {"from": "observation", "value": "3"}, GPT],
            (USER, WITH_CALL, Message("tool", "3"), ASSISTANT),
        ),
        ([HUMAN, GPT, {"from": "tool", "value": "3"}], (USER, ASSISTANT, Message("tool", "3"))),
        ([HUMAN, GPT, {"from": "function_response", "value": "3"}], (USER, ASSISTANT, Message("tool", "3"))),
    ],
)
def test_sharegpt_conversations_are_read(turns, expected):
    assert sharegpt(*turns) == expected
    assert parse({"conversation": turns}, "sharegpt").messages == expected
    assert messages(*turns) == expected


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [Q, A]}),
        ("sharegpt", {"conversations": [HUMAN, GPT]}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
        ("alpaca", {"instruction": "q", "output": "a"}),
    ],
)
def test_every_chat_format_takes_tools_and_a_system_text(name, row, tools):
    expected = Conversation((SYSTEM, USER, ASSISTANT), (TOOL,))
    assert parse(row | {"system": "s", "tools": tools}, name) == expected
    assert parse(row | {"system": "s", "functions": tools}, name) == expected
    assert parse(row | {"system": "s", "functions": tools, "tools": None}, name) == expected
    assert parse(row | {"system": "", "tools": ""}, name) == Conversation((USER, ASSISTANT))
    assert parse(row | {"system": None, "tools": None}, name) == Conversation((USER, ASSISTANT))


def test_tools_are_kept_as_they_are():
    bare = {"name": "add", "parameters": {"default": None}}
    assert parse({"messages": [Q, A], "tools": [bare, TOOL]}).tools == (bare, TOOL)


def test_conversations_without_a_system_turn_get_the_default_one():
    assert parse({"messages": [Q, A]}, system="s").messages == (SYSTEM, USER, ASSISTANT)
    own = {"role": "system", "content": ""}
    assert parse({"messages": [own, Q, A]}, system="s").messages == (Message("system", ""), USER, ASSISTANT)
    assert parse({"instruction": "q", "output": "a", "system": "t"}, "alpaca", "s").messages[0] == Message(
        "system", "t"
    )


HOSTILE_TURNS = [
    ([], "messages must be a list of at least one message", "nothing"),
    ("hi", "messages must be JSON", "found text that is not"),
    ('{"role": "user"}', "messages must be a list", "found an object"),
    (None, "messages must be a list", "found nothing"),
    (["hi"], "messages[0] must be an object", "found text"),
    ([Q, None], "messages[1] must be an object", "found null"),
    ([Q | {"role": "Agent"}], "messages[0].role is 'Agent'", "assistant", "roles: {assistant: Agent}"),
    ([Q | {"role": "x" * 300}], "messages[0].role is 'xxx", "…"),
    ([Q | {"role": 3}], "messages[0].role is 3", "roles:"),
    ([Q | {"role": ["user"]}], "messages[0].role is a list"),
    ([{"content": "q"}], "messages[0].role is missing", "content"),
    ([{"role": "user"}], "messages[0].content is missing", "role"),
    ([Q | {"content": None}], "messages[0].content must be text, found null"),
    ([Q | {"content": {"a": 1}}], "messages[0].content must be text, found an object", "data.on_object=json"),
    ([Q, A | {"content": None}], "messages[1].content must be text, found null"),
    ([Q | {"content": "a\0b"}], "messages[0].content", "NUL", "character 2"),
    ([Q | {"content": "a\ud800"}], "messages[0].content", "surrogate", "character 2"),
    ([Q | {"content": ["q"]}], "messages[0].content[0] must be an object with type and text, found text"),
    ([Q | {"content": [{"type": "file"}]}], "messages[0].content[0].type is 'file'", "'text'"),
    ([Q | {"content": [{"text": "q"}]}], "messages[0].content[0].type is null"),
    ([Q | {"content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text must be text, found a number"),
    ([Q, A | {"reasoning_content": "hm"}], "messages[1].reasoning_content", "data.reasoning=think", "=drop"),
    ([Q, A | {"thinking": "hm"}], "messages[1].thinking holds reasoning"),
    ([Q, A | {"thinking": ["hm"]}], "messages[1].thinking must be text, found a list"),
    ([Q, A | {"thinking": "hm", "reasoning": "ha"}], "messages[1].reasoning and messages[1].thinking differ"),
    ([Q, A | {"refusal": "no"}], "messages[1].refusal", "lost"),
    ([Q | {"images": ["x.png"]}], "messages[0].images", "lost"),
    ([Q | {"audio": {"id": 1}}], "messages[0].audio", "lost"),
    ([Q, A | {"mask": True}], "messages[1].mask", "train, value, weight", "columns: {id: mask}"),
    ([Q | {"\x1b[31m\n": 3}], "messages[0].\\x1b[31m\\n (a number)"),
    ([Q, A | {"train": 1}], "messages[1].train must be true or false, found a number"),
    ([Q, A | {"weight": -1}], "messages[1].weight", "from 0 to 1,000,000, found -1"),
    ([Q, A | {"weight": "1"}], "messages[1].weight", "found '1'"),
    ([Q, A | {"weight": True}], "messages[1].weight", "found true or false"),
    ([Q, A | {"weight": float("nan")}], "messages[1].weight", "found nan"),
    ([Q, A | {"weight": float("inf")}], "messages[1].weight", "found inf"),
    ([Q, A | {"weight": 10**400}], "messages[1].weight", "found a number"),
    ([Q, A | {"weight": 0, "train": True}], "messages[1]", "train: true", "weight: 0"),
    ([Q, A | {"weight": 2, "train": False}], "messages[1]", "train: false", "weight: 2"),
    ([A, Q], "messages[0] is of the assistant", "no user turn before"),
    ([{"role": "system", "content": "s"}, A], "messages[1] is of the assistant", "no user turn before"),
    ([{"role": "tool", "content": "3"}, A], "messages[0] is of the tool", "no user turn before"),
    ([Q, {"role": "tool", "content": "3"}], "messages[1]", "tool"),
    ([Q, {"role": "system", "content": "s"}], "messages[1] is a system turn", "data.turn_order=any"),
    ([{"role": "system", "content": "s"}] * 2 + [Q], "messages[1] is a system turn", "not the first"),
    ([Q | {"tool_calls": [CALL]}], "messages[0] is of the user and calls a tool"),
    ([Q, calling(tool_calls=[CALL], function_call=CALL)], "messages[1] has both tool_calls and function_call"),
    ([Q, calling(tool_calls=["add"])], "messages[1].tool_calls[0] must be an object", "found text"),
    ([Q, calling(tool_calls="add(1)")], "messages[1].tool_calls must be JSON", "not"),
    ([Q, calling(tool_calls=3)], "messages[1].tool_calls must be an object", "found a number"),
    ([Q, calling(tool_calls=[{"name": "f"}])], "messages[1].tool_calls[0] lacks arguments", "name"),
    ([Q, calling(tool_calls=[{"function": {"arguments": {}}}])], "tool_calls[0].function lacks name", "arguments"),
    ([Q, calling(tool_calls=[CALL | {"name": 3}])], "tool_calls[0].name must be text, found a number"),
    ([Q, calling(tool_calls=[CALL | {"name": 'a"b'}])], "tool_calls[0].name", "found 'a\"b'"),
    ([Q, calling(tool_calls=[CALL | {"name": ""}])], "tool_calls[0].name", "found ''"),
    ([Q, calling(tool_calls=[CALL | {"arguments": "x=1"}])], "tool_calls[0].arguments must be JSON"),
    ([Q, A | {"loss": 0.5}], "messages[1].loss must be true or false"),
    ([Q, A | {"loss": False, "train": True}], "messages[1] has both loss and train"),
    ([Q, A | {"loss_weight": -1}], "messages[1].loss_weight", "found -1"),
    ([Q, A | {"content": float("nan")}], "messages[1].content must be JSON"),
    ([Q, A | {"content": {"label": 1}}], "messages[1].content must be text, found an object"),
    ("[{'role': open('x')}]", "messages must be JSON"),
    ("[{'role': 'user', 'role': 'user'}]", "messages must be JSON"),
    ("[{'role': 'user', 'content': ('q',)}]", "messages must be JSON"),
    ([Q, calling(tool_calls=[CALL | {"arguments": "[1]"}])], "tool_calls[0].arguments must be an object", "a list"),
    ([Q, calling(tool_calls=[CALL | {"arguments": [1]}])], "tool_calls[0].arguments must be an object", "a list"),
    ([Q, calling(tool_calls=[CALL | {"arguments": '{"x": NaN}'}])], "tool_calls[0].arguments", "NaN"),
    ([Q, calling(tool_calls=[CALL | {"arguments": '{"x": 1e999}'}])], "tool_calls[0].arguments", "1e999"),
    ([Q, calling(tool_calls=[CALL | {"arguments": '{"x": 1, "x": 2}'}])], "arguments", "the key 'x' twice"),
    ([Q, calling(tool_calls=[CALL | {"arguments": '{"x": "\\u0000"}'}])], "arguments", "NUL"),
    ([Q, calling(tool_calls=[CALL | {"arguments": '{"\\ud800": 1}'}])], "arguments", "surrogate"),
    ([Q, calling(tool_calls=[CALL | {"arguments": '{"x":' * 101 + "1" + "}" * 101}])], "arguments", "nested"),
    ([Q, calling(tool_calls=[CALL | {"arguments": '{"x":' * 10**5 + "1" + "}" * 10**5}])], "arguments", "nested"),
]


@pytest.mark.parametrize(("turns", "words"), [(turns, words) for turns, *words in HOSTILE_TURNS])
def test_the_error_of_a_bad_message_names_location_and_problem(turns, words):
    with pytest.raises(DataError) as error:
        parse({"messages": turns}, rules=STRICT)
    assert [word for word in words if word not in str(error.value)] == []
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([HUMAN | {"from": "agent"}], ["conversations[0].from is 'agent'", "roles: {assistant: agent}"]),
        ([HUMAN | {"value": None}], ["conversations[0].value must be text, found null"]),
        ([{"from": "human"}], ["conversations[0].content is missing", "from"]),
        ([HUMAN, GPT | {"content": "b"}], ["conversations[1] has both value and content"]),
        ([HUMAN, {"from": "function_call", "value": "add(1)"}], ["conversations[1].value must be JSON"]),
        ([HUMAN, {"from": "function_call", "value": []}], ["conversations[1].value", "at least one call"]),
        ([HUMAN, {"from": "function_call", "value": None}], ["conversations[1].value", "found null"]),
        (
            [HUMAN, {"from": "function_call", "value": CALL, "tool_calls": [CALL]}],
            ["conversations[1]", "tool calls"],
        ),
        ([{"from": "function_call", "value": CALL}], ["conversations[0] is of the assistant", "no user turn"]),
        ([GPT, HUMAN], ["conversations[0] is of the assistant", "no user turn"]),
    ],
)
def test_the_error_of_a_bad_sharegpt_turn_uses_the_files_names(turns, words):
    with pytest.raises(DataError) as error:
        parse({"conversations": list(turns)}, "sharegpt", rules=STRICT)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tools": "add(x)"}, ["tools must be JSON", "not"]),
        ({"tools": "{}"}, ["tools must be a list of objects", "found an object"]),
        ({"tools": 3}, ["tools must be a list of objects", "found a number"]),
        ({"tools": ["add"]}, ["tools[0] must be an object", "found text"]),
        ({"tools": [TOOL, {}]}, ["tools[1] must be an object"]),
        ({"tools": [{"name": "a\0"}]}, ["tools", "NUL"]),
        ({"functions": "x"}, ["functions must be JSON"]),
        ({"functions": [TOOL], "tools": [TOOL]}, ["both functions and tools"]),
        ({"system": 3}, ["system must be text, found a number"]),
        ({"images": ["x.png"]}, ["images: file 1 of 1 has no tag <image>"]),
        ({"chosen": "a"}, ["chosen and rejected", "columns: {completion: chosen}"]),
    ],
)
def test_the_error_of_a_bad_tools_or_system_column_names_it(columns, words):
    with pytest.raises(DataError) as error:
        parse({"messages": [Q, A], **columns})
    assert [word for word in words if word not in str(error.value)] == []


def test_a_system_column_and_a_system_turn_contradict_each_other():
    with pytest.raises(DataError, match=r"messages\[0\] and system are both system texts"):
        parse({"system": "s", "messages": [{"role": "system", "content": "t"}, Q, A]})


text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
names = st.from_regex(r"[\w.-]{1,8}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(text, values, max_size=3)
calls = st.lists(st.builds(ToolCall, names, objects), max_size=2).map(tuple)
weights = st.sampled_from([0.0, 0.25, 1.0, 3.0])
users = st.builds(lambda content, weight: Message("user", content, (), weight), text, weights)
assistants = st.builds(lambda content, made, weight: Message("assistant", content, made, weight), text, calls, weights)
results = st.builds(lambda content: Message("tool", content), text)


@st.composite
def conversations(draw) -> Conversation:
    turns = [Message("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [*draw(st.lists(users, min_size=1, max_size=2)), draw(assistants)]
        turns += draw(st.lists(results, max_size=2))
    return Conversation(tuple(turns), tuple(draw(st.lists(objects.filter(bool), max_size=2))))


@given(conversations())
def test_a_conversation_written_as_messages_reads_back_equal(conversation):
    row = messages_row(conversation)
    assert parse(row) == conversation
    assert parse(json.loads(json.dumps(row))) == conversation


def test_a_mapped_key_that_has_the_name_of_a_mask_stays_what_the_source_says():
    row = {"messages": [Q, A | {"loss": 0.25}]}
    assert parse(row, columns={"id": "loss"}).messages == (USER, ASSISTANT)


def test_python_lists_in_a_csv_cell_are_read_as_their_json():
    turns = [Q | {"name": None}, A | {"weight": 0.5, "content": "it's"}]
    assert parse({"messages": str(turns)}) == parse({"messages": json.dumps(turns)})


def test_what_was_read_in_another_form_is_noted_at_its_message():
    notes = [message.notes for message in messages(Q, A | {"content": 4}, {"role": "tool", "content": None}, A)]
    assert [bool(note) for note in notes] == [False, True, True, False]
