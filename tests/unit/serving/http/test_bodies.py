"""Bodies that are refused, each with OpenAI's error body and a sentence that names the key."""

from __future__ import annotations

import json

import pytest

ASK = {"model": "base", "messages": [{"role": "user", "content": "Hello"}]}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


def refused(answer, status: int = 400) -> dict:
    """Return the error of an answer, which has this status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"model": "base", "model": "base"}', "twice"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b'{"temperature": 1e999}', "64-bit"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
        (b'{"a":' * 150 + b"1" + b"}" * 150, "nested"),
    ],
)
def test_what_is_no_strict_json_is_refused(serve, raw, words):
    error = refused(serve().client.post(CHAT, content=raw, headers=JSON))
    assert (error["code"], words in error["message"]) == ("invalid_json", True)


@pytest.mark.parametrize("raw", [b"[]", b"null", b"3", b'"text"', b"{}"])
def test_json_that_is_no_request_is_refused(serve, raw):
    refused(serve().client.post(CHAT, content=raw, headers=JSON))


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; a"])
def test_another_content_type_is_refused(serve, kind):
    # A page of another site could send these without asking first.
    headers = {} if kind is None else {"content-type": kind}
    refused(serve().client.post(CHAT, content=json.dumps(ASK).encode(), headers=headers), 415)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temprature": 1}, "temprature"),
        ({"n": True}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "owner", "content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "a", "contnt": "b"}]}, "messages[0].contnt"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named(serve, change, param):
    assert refused(serve().client.post(CHAT, json=ASK | change))["param"] == param


@pytest.mark.parametrize(
    "change",
    [
        {"top_logprobs": 3},
        {"stream_options": {"include_usage": True}},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    ],
)
def test_keys_that_need_another_key_are_refused(serve, change):
    refused(serve(tools=True).client.post(CHAT, json=ASK | change))


def test_several_problems_are_named_at_once_with_the_nearest_key(serve):
    message = refused(serve().client.post(CHAT, json=ASK | {"temprature": 1, "top_p": 7}))["message"]
    assert "temperature" in message and "top_p" in message


def test_media_are_refused_by_the_name_of_the_model(serve):
    parts = [{"type": "text", "text": "What?"}, {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]
    body = ASK | {"messages": [{"role": "user", "content": parts}]}
    assert "base reads text only" in refused(serve().client.post(CHAT, json=body))["message"]


def test_parts_of_text_are_joined(serve):
    served = serve()
    for content in ("Hello you", [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]):
        assert served.client.post(CHAT, json=ASK | {"messages": [{"role": "user", "content": content}]}).is_success
    first, second = served.engine.requests
    assert first.ids == second.ids


def test_null_stands_for_an_absent_key(serve):
    body = ASK | dict.fromkeys(["temperature", "stop", "n", "tools", "seed", "stream", "response_format", "logit_bias"])
    assert serve().client.post(CHAT, json=body).is_success


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, None),
        ({"prompt": ""}, None),
        ({"prompt": [[1], []]}, None),
        ({"prompt": [1, "a"]}, None),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt_logprobs": 10**6}, "prompt_logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, None),
    ],
)
def test_a_wrong_prompt_is_refused(serve, change, param):
    error = refused(serve().client.post(COMPLETIONS, json={"model": "base", "prompt": "Hello"} | change))
    assert param is None or error["param"] == param


def test_figures_of_a_context_that_is_too_long(serve):
    error = refused(serve().client.post(COMPLETIONS, json={"model": "base", "prompt": [5] * 4000, "max_tokens": 97}))
    assert error["code"] == "context_length_exceeded"
    assert all(figure in error["message"] for figure in ("4,096", "4,000", "97"))
    assert serve().client.post(COMPLETIONS, json={"model": "base", "prompt": [5] * 4000, "max_tokens": 96}).is_success


def test_scores_of_long_prompts_have_a_limit(serve):
    body = {"model": "base", "prompt": [5] * 4000, "max_tokens": 1, "prompt_logprobs": 300}
    assert refused(serve().client.post(COMPLETIONS, json=body))["param"] == "prompt_logprobs"


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(serve):
    client = serve(max_request="1KB").client
    raw = json.dumps(ASK | {"user": "u" * 2000}).encode()
    refused(client.post(CHAT, content=raw, headers=JSON), 413)
    # Without a length, in chunks.
    refused(client.post(CHAT, content=iter([raw[:600], raw[600:]]), headers=JSON), 413)
    assert client.post(CHAT, json=ASK).is_success


def test_unknown_paths_and_methods(serve):
    client = serve().client
    refused(client.get("/v1/nothing"), 404)
    refused(client.get("/docs"), 404)
    answer = client.get(CHAT)
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"
