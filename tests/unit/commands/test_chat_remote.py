"""`finetune chat url=…` with servers that answer, refuse, lie or go away."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.cli import main
from finetune.commands.chat import respond, talk
from finetune.commands.chat_remote import RemoteConversation
from finetune.config.command_options import ChatOptions
from finetune.system.errors import ConfigError, InputError

MODELS = [{"id": "base", "parent": None}, {"id": "skill", "parent": "base"}]


class Server(ThreadingHTTPServer):
    """Answers with the lines of `script`; an exception in it cuts the connection. requests: (path, headers, body)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: Any = MODELS
        self.status = 200
        self.script: list[Any] = []
        self.requests: list[tuple[str, Any, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def says(self, *pieces: str, tokens: int | None = None) -> None:
        events: list[Any] = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
        events += [] if tokens is None else [{"choices": [], "usage": {"completion_tokens": tokens}}]
        self.script = [*(f"data: {json.dumps(event)}\n\n" for event in events), "data: [DONE]\n\n"]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None: ...

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers, None))
        self._send(200, json.dumps({"data": self.server.models}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers, body))
        self._send(self.server.status, *self.server.script)

    def _send(self, status: int, *parts: str) -> None:
        self.send_response(status)
        self.send_header("Location", "http://elsewhere.invalid/")
        self.end_headers()
        for part in parts:
            self.wfile.write(part.encode())
            self.wfile.flush()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    for name in ("FINETUNE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as found:
        thread = Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def reach(server: Server, **options: Any) -> RemoteConversation:
    return RemoteConversation.reach(ChatOptions(url=server.url, **options))


def test_every_turn_is_sent_with_those_before_it_and_the_settings(server, capsys):
    server.says("fi", "ne")
    talking = reach(server, system="short", temperature=0.5, max_new_tokens=7)
    talk(talking, ["hi", "/temperature 0", "/system be brief", "bye"])
    path, _, body = server.requests[-1]
    assert path == "/v1/chat/completions" and capsys.readouterr().out == "fine\nfine\n"
    assert [(turn["role"], turn["content"]) for turn in body["messages"]] == [
        ("system", "be brief"), ("user", "hi"), ("assistant", "fine"), ("user", "bye")
    ]  # fmt: skip
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0.0, 7, True)
    assert server.requests[-2][2]["temperature"] == 0.5


def test_the_first_adapter_is_chosen_unless_a_model_is_named(server):
    assert reach(server).model == "skill" and reach(server, model="base").model == "base"
    with pytest.raises(InputError, match="base, skill"):
        reach(server, model="other")
    server.models = MODELS[:1]
    assert reach(server).model == "base"


@pytest.mark.parametrize("names", [["FINETUNE_API_KEY"], ["OPENAI_API_KEY"], ["FINETUNE_API_KEY", "OPENAI_API_KEY"]])
def test_the_key_comes_from_the_environment(server, monkeypatch, names):
    for name in names:
        monkeypatch.setenv(name, f"of {name}")
    reach(server)
    assert server.requests[0][1]["Authorization"] == f"Bearer of {names[0]}"


def test_the_servers_count_of_tokens_is_shown(server, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    server.says("a", "b", tokens=17)
    reach(server).answer("hi")
    assert "17 tokens" in capsys.readouterr().err


CHUNK = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'


@pytest.mark.parametrize(
    ("status", "script", "named"),
    [
        (404, ['{"error": {"message": "no such model"}}'], "no such model"),
        (429, ['{"error": {"message": "the queue is full"}}'], "the queue is full"),
        (500, ["<html>\x1b[2J</html>"], "500"),
        (302, [""], "302"),
        (200, [CHUNK], "complete"),
        (200, [CHUNK, "data: {\n\n"], "not JSON"),
        (200, [CHUNK, 'data: {"error": {"message": "out of memory"}}\n\n'], "out of memory"),
        (200, ['data: {"choices": [7]}\n\n'], "chunk"),
        (200, ['data: {"choices": 7}\n\n'], "chunk"),
        (200, ['data: {"choices": [], "usage": 3}\n\n'], "chunk"),
        (200, ["data: []\n\n"], "[]"),
    ],
)
def test_an_error_of_the_server_is_a_sentence_and_the_chat_goes_on(server, capsys, status, script, named):
    talking = reach(server)
    server.status, server.script = status, script
    talk(talking, ["hi"])
    shown = capsys.readouterr()
    assert named in shown.err and "\x1b" not in shown.err + shown.out and talking.turns == []
    server.status = 200
    server.says("fine")
    talk(talking, ["hi"])
    assert capsys.readouterr().out.endswith("fine\n")


def test_a_server_that_is_gone_or_is_another_thing_is_an_input_error(server):
    server.models = {"not": "a list"}
    with pytest.raises(InputError, match="models"):
        reach(server)
    with pytest.raises(InputError, match="runs"):
        RemoteConversation.reach(ChatOptions(url="http://127.0.0.1:9"))
    for url in ("127.0.0.1:8000", "ftp://host", "http://user:secret@host"):
        with pytest.raises(ConfigError, match="url"):
            RemoteConversation.reach(ChatOptions(url=url))


def test_ctrl_c_closes_the_stream_and_keeps_the_start_of_the_answer(server, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    talking = reach(server)
    server.says("half ", "never")
    closed = []
    events = talking.client.events

    def interrupted(body: Any) -> Iterator[Any]:
        try:
            yield next(events(body))
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr(talking.client, "events", interrupted)
    talking.answer("hi")
    assert talking.turns[-1].content == "half " and closed and "[stopped]" in capsys.readouterr().err


def test_the_model_cannot_send_control_characters_to_the_terminal(server, capsys):
    server.says("\x1b]0;owned\x07\x1b[2Jhello\r\x9b31m")
    talk(reach(server), ["hi"])
    assert not [c for c in capsys.readouterr().out if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160]


def test_files_are_refused(server, capsys):
    talking = reach(server)
    assert respond(talking, "/help")
    talk(talking, ["/image cat.png"])
    assert "/image" in capsys.readouterr().err and talking.files == []


def test_the_command_answers_every_line_of_a_pipe(server, monkeypatch, capsys):
    server.says("fine")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n\nbye\n")))
    assert main(["chat", f"url={server.url}/v1/"]) == 0
    assert capsys.readouterr().out == "fine\nfine\n" and len(server.requests) == 3


@pytest.mark.parametrize("extra", ["adapter=outputs/x", "config=quickstart.yaml", "quant.type=none"])
def test_settings_of_loading_have_no_effect_and_are_refused(server, capsys, extra):
    assert main(["chat", f"url={server.url}", extra]) == 2
    assert extra in capsys.readouterr().err and server.requests == []
