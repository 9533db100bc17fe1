"""Calls of tools in a stream of text: any cut of the text gives the same content and calls, and nothing is lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from finetune.data.formats.messages import Conversation, Message, ToolCall
from finetune.data.template.chat import ChatTemplate
from finetune.serving.tool_calls import CLOSE, OPEN, CalledTool, ToolCallParser


def parse(pieces) -> list[str | CalledTool]:
    """Content and calls of a text in pieces; neighboring contents are one."""
    parser = ToolCallParser()
    found = [each for piece in pieces for each in parser.push(piece)] + parser.finish()
    joined: list[str | CalledTool] = []
    for each in found:
        assert each != ""
        if joined and isinstance(each, str) and isinstance(joined[-1], str):
            joined[-1] += each
        else:
            joined.append(each)
    return joined


def written(name: str, arguments: str) -> str:
    """A call as Qwen2.5's template writes it."""
    return f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n{CLOSE}'


CALL = written("f", '{"a": 1}')
CALLED = CalledTool("f", '{"a": 1}')
TAGS = f'{{"a": "x {CLOSE} {OPEN} \\" \\\\"}}'  # tags and quotes in a string


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", ["plain text"]),
        ("", []),
        (CALL, [CALLED]),
        (f"{CALL}\n{CALL}", [CALLED, CALLED]),
        (f"{CALL}{CALL}", [CALLED, CALLED]),
        (f"Let me see.\n{CALL}", ["Let me see.", CALLED]),
        (f"one\n\n{CALL}\ntwo\n{CALL}\n\nthree", ["one\n", CALLED, "\ntwo", CALLED, "\n\nthree"]),
        (written("f", '{"a": {"b": [{}, {"c": "}"}]}}'), [CalledTool("f", '{"a": {"b": [{}, {"c": "}"}]}}')]),
        (written("f", TAGS), [CalledTool("f", TAGS)]),
        (written("größe", '{"ä": "漢"}').replace("\\u00f6", "ö"), [CalledTool("größe", '{"ä": "漢"}')]),
        (f'{OPEN}{{"name":"f","arguments":{{"a":1}}}}{CLOSE}', [CALLED]),
        (f'{OPEN} \n{{"arguments": {{"a": 1}},\n "name": "f"}}\n\n {CLOSE}', [CALLED]),
        (written("f", json.dumps('{"a": 1}')), [CALLED]),
        (f'{OPEN}\n{{"name": "f"}}\n{CLOSE}', [CalledTool("f", "{}")]),
        # Broken or unfinished ones are content, and the next call is found.
        (f"a {OPEN}\n", [f"a {OPEN}\n"]),
        (f"a\n{OPEN}", [f"a\n{OPEN}"]),
        (CALL[:-1], [CALL[:-1]]),
        (f"{OPEN}\n{OPEN}{CALL}", [f"{OPEN}\n{OPEN}", CALLED]),
        (f"{OPEN}{{}}{CALL}", [f"{OPEN}{{}}", CALLED]),
        (f"{OPEN}no JSON{CLOSE}{CALL}", [f"{OPEN}no JSON{CLOSE}", CALLED]),
        (f'{OPEN}\n{{"name": "f", "arguments": {{"a": 1}}\n{CLOSE}\n{CALL}',
         [f'{OPEN}\n{{"name": "f", "arguments": {{"a": 1}}\n{CLOSE}', CALLED]),
        (f'{OPEN}\n{{"name": "f\n{CALL}', [f'{OPEN}\n{{"name": "f', CALLED]),
        (written("f", '{"a": 1]'), [written("f", '{"a": 1]')]),
        (f"{OPEN}[1]{CLOSE}", [f"{OPEN}[1]{CLOSE}"]),
        (f"{OPEN}{{}}{CLOSE}", [f"{OPEN}{{}}{CLOSE}"]),
        (f"</tool_call>{CALL}<tool_call", ["</tool_call>", CALLED, "<tool_call"]),
        (f"<tool_<tool_call{CALL}", ["<tool_<tool_call", CALLED]),
    ],
)  # fmt: skip
def test_calls_in_a_text_cut_everywhere(text, expected):
    assert parse([text]) == expected
    assert parse(text) == expected
    for size in (2, 3, 7):
        assert parse(text[i : i + size] for i in range(0, len(text), size)) == expected


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "", "arguments": {}}',
        '{"name": 3, "arguments": {}}',
        '{"name": null}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "not JSON"}',
        '{"name": "f", "arguments": null}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": {"a": "\\ud800"}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
        '{"name": "f", "arguments": ' + '{"a": ' * 200 + "1" + "}" * 201,
        '{"name": "f", "arguments": {"a": ' + "[" * 100_000,
        '{"name": "f", "arguments": {"a": 1,}}',
        '{"a": {"name": "f", "arguments": {}}}',
    ],
)
def test_what_is_no_call_stays_content_whatever_it_holds(body):
    text = f"{OPEN}\n{body}\n{CLOSE}"
    assert parse([text]) == [text]
    assert "".join(map(str, parse(text[i : i + 5] for i in range(0, len(text), 5)))) == text


PARTS = st.sampled_from(
    [CALL, OPEN, CLOSE, "\n", "<", "</", ">", "tool_call", "{", "}", "[", "]", '"', "\\", " ", "a", '{"name": "f"}']
)


@given(st.lists(PARTS, max_size=14).map("".join), st.data())
@example(f"{OPEN}{{<tool_call>{CALL}", None)
@settings(max_examples=400, deadline=None)
def test_any_cut_gives_the_same_and_nothing_is_lost(text, data):
    whole = parse([text])
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8))) if data else []
    assert parse(text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)) == whole
    assert parse(text) == whole
    # Every character is content or part of a call with the line break before it.
    rest = text
    for each in whole:
        if isinstance(each, str):
            assert rest.startswith(each)
            rest = rest[len(each) :]
        else:
            call, closed, rest = rest.partition(CLOSE)
            assert closed and call.removeprefix("\n").startswith(OPEN)
    assert rest == ""


# Without the two characters that no row may have.
CHARACTERS = st.characters(exclude_characters="\ue0f0\ue0f1", exclude_categories=["Cs"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(CHARACTERS, max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(CHARACTERS, max_size=4), inner, max_size=3),
    max_leaves=8,
)


def some_conversation(draw) -> Conversation:
    texts = st.text(CHARACTERS.filter(lambda character: character != "<"), max_size=10)
    arguments = st.dictionaries(st.text(CHARACTERS, max_size=4), json_values, max_size=3)
    calls = st.lists(st.tuples(st.from_regex(r"\A[a-z_]{1,6}\Z"), arguments), max_size=3)
    made = tuple(ToolCall(name, each) for name, each in draw(calls))
    return Conversation((Message("user", "?"), Message("assistant", draw(texts if made else st.just("4")), made)))


def test_what_the_template_of_qwen_writes_is_read_again(shared):
    """The content and the calls of a turn come back, for all contents without a tag."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "qwen2.5" / "tokenizer")
    chat = ChatTemplate(tokenizer)

    @given(st.composite(some_conversation)())
    @settings(max_examples=60, deadline=None)
    def holds(conversation):
        turn = conversation.messages[-1]
        # An answer starts after the line break of its header.
        found = parse([chat.answer_text(conversation).removeprefix("\n")])
        assert [each for each in found if isinstance(each, str)] == [turn.content] * bool(turn.content)
        read = [(each.name, json.loads(each.arguments)) for each in found if isinstance(each, CalledTool)]
        assert read == [(call.name, call.arguments) for call in turn.tool_calls]

    holds()
