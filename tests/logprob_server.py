"""A server that speaks the part of vLLM's API which returns log-probabilities of a prompt's tokens, over real HTTP.

Its model is a table: what comes after a token depends on that token alone, so every number is known in closed form.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

MODEL = "tests/table"
Fault = Callable[["_Handler", dict[str, Any]], None]


class LogprobTeacher:
    """Use it as a context; `faults` are taken by the requests for log-probabilities in the order of their arrival.

    table_VV: natural log-probabilities of the token after each token. seen: (path, headers, question) of every request.
    """

    def __init__(self, vocabulary: int = 50, max_logprobs: int = 20, max_model_len: int = 64, seed: int = 0):
        logits_VV = np.random.default_rng(seed).normal(scale=2.0, size=(vocabulary, vocabulary))
        self.table_VV = logits_VV - np.log(np.exp(logits_VV).sum(axis=1, keepdims=True))
        self.max_logprobs, self.max_model_len = max_logprobs, max_model_len
        self.faults: deque[Fault | None] = deque()
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answered = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.teacher = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> LogprobTeacher:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        prompt, top = question["prompt"], question["prompt_logprobs"]
        after = [self._entry(self.table_VV[before], token, top) for before, token in itertools.pairwise(prompt)]
        choice = {"index": 0, "text": " x", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        return {"object": "text_completion", "model": MODEL, "choices": [{**choice, "prompt_logprobs": [None, *after]}]}

    def refusal(self, question: dict[str, Any]) -> tuple[int, str] | None:
        """Status and message of vLLM for requests beyond its limits."""
        prompt, top = question["prompt"], question["prompt_logprobs"]
        if question["model"] != MODEL:
            return 404, f"The model `{question['model']}` does not exist."
        if top > self.max_logprobs:
            return 400, f"Requested prompt logprobs of {top}, which is greater than max allowed: {self.max_logprobs}"
        if len(prompt) + question["max_tokens"] > self.max_model_len:
            return 400, f"This model's maximum context length is {self.max_model_len} tokens."
        return None

    def _entry(self, log_probs_V: np.ndarray, token: int, top: int) -> dict[str, Any]:
        """The prompt's own token first, as vLLM has it, then the most probable ones."""
        ranked = np.argsort(-log_probs_V, kind="stable").tolist()
        return {
            str(each): {"logprob": log_probs_V[each], "rank": ranked.index(each) + 1, "decoded_token": f"<{each}>"}
            for each in dict.fromkeys([token, *ranked[:top]])
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def teacher(self) -> LogprobTeacher:
        return self.server.teacher

    def do_GET(self) -> None:
        self.teacher.seen.append((self.path, dict(self.headers), {}))
        if self.path != "/v1/models":
            self.refuse(404, "Not Found")
        else:
            self.reply(200, {"object": "list", "data": [{"id": MODEL, "max_model_len": self.teacher.max_model_len}]})

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.teacher.seen.append((self.path, dict(self.headers), question))
        self.teacher.asked.release()
        if self.path != "/v1/completions":
            self.refuse(404, "Not Found")
        elif refusal := self.teacher.refusal(question):
            self.refuse(*refusal)
        elif self.teacher.faults and (fault := self.teacher.faults.popleft()) is not None:
            fault(self, self.teacher.answer(question))
        else:
            self.reply(200, self.teacher.answer(question))

    def refuse(self, status: int, words: str, **headers: str) -> None:
        self.reply(status, {"error": {"message": words, "type": "BadRequestError", "code": status}}, **headers)

    def reply(self, status: int, answer: Any, **headers: str) -> None:
        self.send(status, json.dumps(answer).encode(), **headers)

    def send(self, status: int, body: bytes, announced_bytes: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if announced_bytes is None else announced_bytes))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        try:
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            # The client has gone.
            self.close_connection = True
        self.teacher.answered.release()

    def log_message(self, *message: object) -> None:
        pass


def drop(handler: _Handler, answer: dict[str, Any]) -> None:
    """The connection ends without an answer."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def other_protocol(handler: _Handler, answer: dict[str, Any]) -> None:
    handler.connection.sendall(b"SSH-2.0-server\r\n")
    handler.close_connection = True


def status(code: int, words: str = "no", **headers: str) -> Fault:
    return lambda handler, answer: handler.refuse(code, words, **headers)


def redirect(url: str) -> Fault:
    return lambda handler, answer: handler.send(307, b"", Location=url)


def incomplete(handler: _Handler, answer: dict[str, Any]) -> None:
    """Half of the body, then the connection ends."""
    body = json.dumps(answer).encode()
    handler.send(200, body[: len(body) // 2], announced_bytes=len(body))
    handler.close_connection = True


def raw(body: bytes) -> Fault:
    return lambda handler, answer: handler.send(200, body)


def edited(edit: Callable[[dict[str, Any]], object]) -> Fault:
    """An answer that `edit` has changed in place."""

    def fault(handler: _Handler, answer: dict[str, Any]) -> None:
        edit(answer)
        handler.reply(200, answer)

    return fault


def after(event: threading.Semaphore | threading.Event, times: int = 1) -> Fault:
    """The right answer, after `times` occurrences of `event` within a minute each."""

    def fault(handler: _Handler, answer: dict[str, Any]) -> None:
        wait = event.acquire if isinstance(event, threading.Semaphore) else event.wait
        if all(wait(timeout=60) for _ in range(times)):
            handler.reply(200, answer)

    return fault


def dripping(event: threading.Event) -> Fault:
    """A byte every few milliseconds until `event`: no read waits long, and the answer never ends."""

    def fault(handler: _Handler, answer: dict[str, Any]) -> None:
        handler.send(200, b"{", announced_bytes=10**6)
        try:
            while not event.wait(0.02):
                handler.wfile.write(b" ")
        except OSError:
            pass
        handler.close_connection = True

    return fault
