"""The `openai` package and curl as clients, through a real socket."""

from __future__ import annotations

import json
import subprocess

import openai
import pytest

ANSWER = "The capital of France is Paris. Café 😀"
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Kyiv"}}\n</tool_call>'


@pytest.fixture
def connect(listen):
    """Return a function that serves, and returns the client and the service."""

    def build(**options):
        url, served = listen(**options)
        key = options.get("api_key") or "none"
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0), served

    return build


def test_a_chat_is_answered(connect):
    client, served = connect(reply=ANSWER)
    reply = client.chat.completions.create(model="base", messages=HELLO)
    choice = reply.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (ANSWER, "assistant", "stop")
    prompt = served.engine.requests[0].ids
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), len(served.ids(ANSWER)) - 1)
    assert served.chat.backend.decode(list(prompt), skip_special_tokens=False).endswith(
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_stream_has_the_text_of_the_whole_answer_and_its_counts(connect):
    client, _ = connect(reply=ANSWER)
    whole = client.chat.completions.create(model="base", messages=HELLO)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="base", messages=HELLO, stream=True, stream_options=options))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == ANSWER
    assert len(texts) > 10 and "�" not in "".join(texts)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert {chunk.usage for chunk in chunks[:-1]} == {None}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_an_answer_and_is_left_out(connect, stream):
    client, served = connect(reply=ANSWER, seconds=0.01)
    reply = client.chat.completions.create(model="base", messages=HELLO, stop=["s Pa", "never"], stream=stream)
    if stream:
        chunks = list(reply)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, reason) == ("The capital of France i", "stop")
    assert served.engine.cancelled == [1]


def test_log_probabilities_have_the_bytes_of_the_answer(connect):
    client, served = connect(reply=ANSWER)
    reply = client.chat.completions.create(model="base", messages=HELLO, logprobs=True, top_logprobs=2)
    content = reply.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == ANSWER
    assert {token.logprob for token in content} == {-0.5}
    assert served.engine.requests[0].log_probs == 2
    chunks = client.chat.completions.create(model="base", messages=HELLO, logprobs=True, stream=True)
    scores = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    assert [token.token for each in scores if each for token in each.content] == [token.token for token in content]


def test_several_answers_have_seeds_of_their_own(connect):
    client, served = connect(reply=ANSWER)
    reply = client.chat.completions.create(model="base", messages=HELLO, n=3, seed=7, temperature=0.5)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [request.sampling.seed for request in served.engine.requests] == [7, 8, 9]
    chunks = client.chat.completions.create(model="base", messages=HELLO, n=2, seed=7, stream=True)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: ANSWER, 1: ANSWER}


def test_settings_reach_the_engine(connect):
    client, served = connect(reply=ANSWER)
    client.chat.completions.create(
        model="pirate",
        messages=HELLO,
        max_completion_tokens=5,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        user="me",
        metadata={"a": "b"},
        extra_body={"top_k": 4, "repetition_penalty": 1.5, "stop_token_ids": [3]},
    )
    request = served.engine.requests[0]
    sampling = request.sampling
    assert (request.adapter, request.max_tokens, 3 in request.stop_ids) == ("pirate", 5, True)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 0.5, 4)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)


def test_without_a_limit_the_answer_may_fill_the_context(connect):
    client, served = connect(reply=ANSWER)
    client.chat.completions.create(model="base", messages=HELLO)
    request = served.engine.requests[0]
    assert len(request.ids) + request.max_tokens == served.engine.context_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_parsed(connect, stream):
    client, served = connect(tools=True, reply=f"Let me see.\n{CALL}\n{CALL}")
    reply = client.chat.completions.create(model="base", messages=HELLO, tools=[WEATHER], stream=stream)
    if stream:
        chunks = list(reply)
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert [call.index for call in calls] == [0, 1]
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = reply.choices[0]
        calls, text, reason = choice.message.tool_calls, choice.message.content, choice.finish_reason
    assert [call.function.name for call in calls] == ["weather", "weather"]
    assert json.loads(calls[0].function.arguments) == {"city": "Kyiv"}
    assert len({call.id for call in calls}) == 2
    assert (text.strip(), reason) == ("Let me see.", "tool_calls")
    assert '"name": "weather"' in served.chat.backend.decode(list(served.engine.requests[0].ids))


def test_an_answer_with_calls_and_their_results_is_a_next_prompt(connect):
    client, served = connect(tools=True, reply=CALL)
    message = client.chat.completions.create(model="base", messages=HELLO, tools=[WEATHER]).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    turns = [*HELLO, message.model_dump(), result]
    client.chat.completions.create(model="base", messages=turns, tools=[WEATHER], parallel_tool_calls=False)
    prompt = served.chat.backend.decode(list(served.engine.requests[1].ids), skip_special_tokens=False)
    assert f"\n{CALL}<|im_end|>\n<|im_start|>tool\nsunny<|im_end|>" in prompt


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_written_under_a_grammar(connect, choice):
    client, served = connect(tools=True, reply='{"name": "weather", "arguments": {"city": "Kyiv"}}')
    other = {"type": "function", "function": {"name": "other"}}
    reply = client.chat.completions.create(
        model="base", messages=HELLO, tools=[WEATHER, other], tool_choice=choice, temperature=0
    )
    call = reply.choices[0].message.tool_calls[0].function
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Kyiv"})
    request = served.engine.requests[0]
    assert served.chat.backend.decode(list(request.ids)).endswith("<tool_call>\n")
    assert ("other" in request.sampling.grammar) == (choice == "required")


def test_no_call_is_looked_for_where_none_is_wanted(connect):
    client, served = connect(tools=True, reply=CALL)
    reply = client.chat.completions.create(model="base", messages=HELLO, tools=[WEATHER], tool_choice="none")
    assert (reply.choices[0].message.content, reply.choices[0].message.tool_calls) == (CALL, None)
    assert "weather" not in served.chat.backend.decode(list(served.engine.requests[0].ids))


def test_the_schema_of_an_answer_reaches_the_engine(connect):
    client, served = connect(reply="{}")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for wanted in ({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, {"type": "json_object"}):
        client.chat.completions.create(model="base", messages=HELLO, response_format=wanted)
    grammars = [json.loads(request.sampling.grammar) for request in served.engine.requests]
    assert grammars == [schema, {"type": "object"}]


def test_completions_of_texts_and_tokens(connect):
    client, served = connect()
    ids = served.chat.encode_texts(["Hello there"])[0].tolist()
    for prompt, count in [("Hello there", 1), (ids, 1), (["Hello there", "Hello there"], 2), ([ids, ids], 2)]:
        reply = client.completions.create(model="base", prompt=prompt, max_tokens=len(ids))
        assert [choice.text for choice in reply.choices] == ["Hello there"] * count
    assert {request.ids for request in served.engine.requests} == {tuple(ids)}
    reply = client.completions.create(model="base", prompt="Hello", echo=True, logprobs=1, max_tokens=1)
    scores = reply.choices[0].logprobs
    assert "".join(scores.tokens) == reply.choices[0].text == "HelloH"
    assert (scores.token_logprobs[0], scores.text_offset[:2]) == (None, [0, 1])
    chunks = client.completions.create(model="base", prompt=["Hello", "there"], stream=True, logprobs=0)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["Hello", "there"]


def test_control_tokens_in_a_completions_prompt_are_control_tokens(connect):
    client, served = connect()
    client.completions.create(model="base", prompt="<|im_start|>user\nHi<|im_end|>")
    ids = served.engine.requests[0].ids
    assert (ids[0], ids[-1]) == (served.chat.control_ids["<|im_start|>"], served.chat.control_ids["<|im_end|>"])


def test_models_are_listed_with_their_details(connect):
    client, served = connect()
    models = client.models.list().data
    assert [model.id for model in models] == ["base", "pirate"]
    pirate = client.models.retrieve("pirate").model_dump()
    assert (pirate["parent"], pirate["max_model_len"]) == ("base", served.engine.context_tokens)
    assert pirate["details"] == {"max_kl": 0.001}


@pytest.mark.parametrize(
    ("kind", "code", "settings"),
    [
        (openai.NotFoundError, "model_not_found", {"model": "missing"}),
        (openai.BadRequestError, "context_length_exceeded", {"max_tokens": 4096}),
        (openai.BadRequestError, "unknown_parameter", {"extra_body": {"temprature": 1}}),
        (openai.BadRequestError, "invalid_value", {"temperature": 3}),
    ],
)
def test_errors_are_those_of_the_client(connect, kind, code, settings):
    client, _ = connect()
    with pytest.raises(kind) as error:
        client.chat.completions.create(**{"model": "base", "messages": HELLO} | settings)
    assert error.value.code == code
    assert error.value.request_id.startswith("req_")


def test_a_wrong_key_is_refused(connect):
    client, _ = connect(api_key="secret", reply=ANSWER)
    assert client.chat.completions.create(model="base", messages=HELLO).choices
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="Secret").models.list()


def test_curl_reads_a_stream(listen):
    url, _ = listen(reply=ANSWER)
    body = json.dumps({"model": "base", "messages": HELLO, "stream": True})
    command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = [line for line in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split("\n\n")]
    assert lines[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
