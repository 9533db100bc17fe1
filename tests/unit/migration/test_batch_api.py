"""Requests of a batch API and their answers become rows of messages, joined by custom_id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config.schema import SourceConfig
from finetune.data.formats.messages import Conversation
from finetune.data.formats.parser import RowParser, messages_row
from finetune.data.sources.paths import resolve_source
from finetune.migration.batch_api import join_answers
from finetune.system.errors import DataError

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def request(name: object, **body: object) -> dict:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": f"ask {name}"}]
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages, **body}}


def answer(name: object, reason: str = "stop", status: int = 200, copies: int = 1, **message: object) -> dict:
    text = {"role": "assistant", "content": f"say {name}", "refusal": None, "annotations": []} | message
    choices = [{"index": 0, "message": text, "logprobs": None, "finish_reason": reason}] * copies
    return {
        "id": f"batch_{name}",
        "custom_id": name,
        "response": {"status_code": status, "request_id": "r", "body": {"choices": choices}},
        "error": None,
    }


def joined(folder: Path, requests: list[dict], answers: list[dict]) -> list[Conversation | DataError]:
    for name, rows in (("requests", requests), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = SourceConfig(path=str(folder / "requests.jsonl"))
    batches = join_answers(resolve_source(source).batches(), str(folder / "answers.jsonl"))
    return [example for batch in batches for _, example in RowParser(source).rows(batch)]  # type: ignore[misc]


def test_each_request_is_followed_by_its_own_answer(tmp_path):
    requests = [request("a"), request("b", tools=[TOOL])]
    answers = [answer("b", content=None, tool_calls=[CALL]), answer("a")]
    first, second = map(messages_row, joined(tmp_path, requests, answers))
    assert first == {"messages": [*requests[0]["body"]["messages"], {"role": "assistant", "content": "say a"}]}
    assert second["tools"] == [TOOL] and second["messages"][-1]["tool_calls"][0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    ("given", "reply"),
    [
        (request("a"), answer("b")),
        (request("a"), answer("a", reason="length")),
        (request("a"), answer("a", status=500)),
        (request("a"), answer("a", copies=2)),
        (request("a"), {"custom_id": "a", "response": None, "error": {"code": "expired"}}),
        ({"custom_id": "a", "body": {"input": "x"}}, answer("a")),
        (request(7), answer("a")),
    ],
)
def test_a_request_without_one_whole_answer_is_a_bad_row(tmp_path, given, reply):
    bad, good = joined(tmp_path, [given, request("good")], [reply, answer("good")])
    assert isinstance(bad, DataError) and isinstance(good, Conversation)


def test_an_answer_is_used_once(tmp_path):
    good, bad = joined(tmp_path, [request("a"), request("a")], [answer("a")])
    assert isinstance(good, Conversation) and isinstance(bad, DataError)


@pytest.mark.parametrize("answers", [[answer("a"), answer("a")], [request("a")], [answer(7)]])
def test_a_file_of_answers_without_one_answer_for_each_name_is_refused(tmp_path, answers):
    with pytest.raises(DataError, match=r"answers.jsonl:\d: "):
        joined(tmp_path, [request("a")], answers)
