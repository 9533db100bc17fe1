"""Clients that go away, engines that fail, and what a stream says then."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from finetune.serving.request import Finished, Load, Token
from tests.serving_http import wait_for
from tests.unit.serving.http.test_bodies import ASK, CHAT, refused


class FailingEngine:
    """Fails after some tokens of each answer."""

    context_tokens = 100

    def __init__(self, tokens: int, end: Finished):
        self.tokens, self.end = tokens, end

    def submit(self, request, put) -> None:
        for _ in range(self.tokens):
            put(Token(5))
        put(self.end)

    def cancel(self, handle) -> None:
        pass

    def load(self) -> Load:
        return Load()

    def close(self) -> None:
        pass


def events(answer: httpx.Response) -> list[str]:
    """Return the contents of the events of a stream."""
    return [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("end", "status"),
    [(Finished("error", error="the logits are not finite"), 500), (Finished("cancelled"), 503)],
)
def test_an_engine_that_fails_before_the_first_token(serve, stream, end, status):
    client = serve(engine=FailingEngine(0, end)).client
    error = refused(client.post(CHAT, json=ASK | {"stream": stream}), status)
    assert end.error in error["message"]


def test_an_engine_that_fails_in_a_stream(serve):
    client = serve(engine=FailingEngine(3, Finished("error", error="the logits are not finite"))).client
    refused(client.post(CHAT, json=ASK), 500)
    answer = client.post(CHAT, json=ASK | {"stream": True})
    found = events(answer)
    assert answer.status_code == 200
    assert found[-1] == "[DONE]"
    assert json.loads(found[-2])["error"]["message"] == "the logits are not finite"


def test_the_client_of_openai_sees_the_failure_of_a_stream(listen):
    url, _ = listen(engine=FailingEngine(3, Finished("error", error="the logits are not finite")))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(**ASK, stream=True))


def test_what_fails_unexpectedly_tells_a_client_nothing(serve, monkeypatch, capsys):
    served = serve()
    monkeypatch.setattr(served.service.chat, "prompt_ids", lambda *_: 1 / 0, raising=False)
    error = refused(served.client.post(CHAT, json=ASK), 500)
    assert "division" not in error["message"]
    assert "division" in "".join(capsys.readouterr())


@pytest.mark.parametrize("change", [{"stream": True}, {}, {"n": 2, "seed": 1}, {"n": 2, "seed": 1, "stream": True}])
def test_a_client_that_goes_away_cancels_its_answers(listen, change):
    url, served = listen(reply=lambda request: [5] * 4000, seconds=0.01)
    body = json.dumps(ASK | {"max_tokens": 4000} | change).encode()
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        count = change.get("n", 1)
        wait_for(lambda: served.engine.load().running == count)
        if change.get("stream"):
            assert b"200 OK" in connection.recv(1000)
    wait_for(lambda: len(served.engine.cancelled) == count)
    wait_for(lambda: served.engine.load().running == 0)
    assert httpx.get(f"{url}/health").is_success


def test_a_stream_comes_as_it_is_written(listen):
    url, _ = listen(reply=lambda request: [5] * 4000, seconds=0.01)
    with httpx.stream("POST", url + CHAT, json=ASK | {"stream": True, "max_tokens": 4000}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        lines = answer.iter_lines()
        first = [next(lines) for _ in range(6)]
    assert json.loads(first[2].removeprefix("data: "))["choices"][0]["delta"]["content"]
