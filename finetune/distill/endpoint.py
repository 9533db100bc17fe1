"""JSON over HTTP with a server that may be busy, away for a while, or wrong: time limits, attempts, a way to stop."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Event, Lock
from typing import Any
from urllib.parse import SplitResult, urlsplit

from finetune.system.console import Log, printable
from finetune.system.errors import ConfigError, FinetuneError

KEY_VARIABLE = "OPENAI_API_KEY"

# Busy or restarting: the same request may succeed later.
_PASSING = frozenset({429, *range(500, 505)})
_LONGEST_BACKOFF_SECONDS = 60.0
_LONGEST_WAIT_SECONDS = 600.0
_PIECE_BYTES = 2**16
_ERROR_BYTES = 2**16
_QUOTED_CHARACTERS = 400


class Refusal(Exception):
    """The server understood and will not answer, however often it is asked; message: its own words."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Halted(Exception):
    """Raised in the threads whose work nobody waits for any more."""


class _Passing(Exception):
    """A failure that may be over at the next attempt, which comes no sooner than in wait_seconds."""

    def __init__(self, reason: str, wait_seconds: float = 0.0):
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class Halt:
    """Ends what several threads do at an endpoint: their waits end, their open connections are shut."""

    def __init__(self) -> None:
        self._halted = Event()
        self._lock = Lock()
        self._open: set[socket.socket] = set()

    def now(self) -> None:
        with self._lock:
            self._halted.set()
            for connected in self._open:
                with suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)

    def wait(self, seconds: float) -> None:
        """Raises: Halted, at once when it is called off."""
        if self._halted.wait(seconds):
            raise Halted

    @contextmanager
    def shuts(self, connected: socket.socket) -> Iterator[None]:
        """Raises: Halted if it is called off already, before anything is sent."""
        with self._lock:
            self._open.add(connected)
        try:
            self.wait(0)
            yield
        finally:
            with self._lock:
                self._open.discard(connected)


class Endpoint:
    """One HTTP API, reached directly (no proxy); a connection for each request.

    The key of OPENAI_API_KEY goes to this host alone: redirects are not followed, and no message holds it.
    """

    def __init__(self, url: str, *, timeout_seconds: float, attempts: int, backoff_seconds: float, log: Log):
        """Raises: ConfigError if the address or the key cannot be one."""
        self._parts = _address(url)
        self.url = self._parts.geturl()
        self._key = _key_of_environment()
        self._timeout_seconds, self._attempts, self._backoff_seconds = timeout_seconds, attempts, backoff_seconds
        self._say = log
        # Its own generator: waiting must not move the random state of whoever trains.
        self._jitter = random.Random()

    def ask(
        self,
        path: str,
        question: Mapping[str, Any] | None,
        most_bytes: int,
        halt: Halt,
        *,
        reduce: Callable[[dict[str, Any]], Any] | None = None,
    ) -> Any:
        """The parsed answer to a GET, or to a POST of `question`; all its numbers are floats.

        reduce: what becomes of each JSON object, innermost first.
        Raises: Refusal if asking again is no use; FinetuneError after the last attempt, or if the answer is larger
        than `most_bytes`; Halted.
        """
        body = None if question is None else json.dumps(question, separators=(",", ":")).encode()
        reason = ""
        for attempt in range(1, self._attempts + 1):
            try:
                return self._parsed(self._attempt(path, body, most_bytes, halt), reduce)
            except _Passing as failure:
                reason, told_seconds = str(failure), failure.wait_seconds
            halt.wait(0)
            if attempt < self._attempts:
                seconds = max(told_seconds, self._backoff(attempt))
                self._say(
                    f"{self.url}: {reason}; asking again in {seconds:.1f} s, attempt {attempt + 1} of {self._attempts}"
                )
                halt.wait(seconds)
        raise FinetuneError(
            f"{self.url}: no answer in {self._attempts} attempts, the last time: {reason}; see whether the server is "
            "up. What it has answered is kept: starting again goes on where this stopped"
        )

    def quote(self, text: str) -> str:
        """Words of the server's, on one line, bounded, safe to print, without the key."""
        words = " ".join(text.split())
        if self._key:
            words = words.replace(self._key, "…")
        return printable(words[:_QUOTED_CHARACTERS] + ("…" if len(words) > _QUOTED_CHARACTERS else ""))

    def _backoff(self, attempt: int) -> float:
        seconds = self._backoff_seconds * 2 ** (attempt - 1)
        return min(seconds, _LONGEST_BACKOFF_SECONDS) * self._jitter.uniform(0.5, 1.0)

    def _attempt(self, path: str, body: bytes | None, most_bytes: int, halt: Halt) -> bytes:
        try:
            status, headers, answer = self._exchange(path, body, most_bytes, halt)
        except TimeoutError:
            raise _Passing(f"no answer within {self._timeout_seconds:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(f"{self.url}: its certificate is not trusted ({self.quote(str(error))})") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"connection failed ({type(error).__name__}: {self.quote(str(error))})") from None
        if status != 200:
            said = self.quote(_message(answer))
            if status in _PASSING:
                raise _Passing(f"HTTP {status}: {said}", _retry_after_seconds(headers.get("Retry-After")))
            raise Refusal(status, said)
        if len(answer) > most_bytes:
            raise FinetuneError(f"{self.url}: the answer is larger than the {most_bytes:,} bytes it can need")
        return answer

    def _parsed(self, answer: bytes, reduce: Callable[[dict[str, Any]], Any] | None) -> Any:
        try:
            # An integer of any length has a float, if an infinite one.
            return json.loads(answer, parse_int=float, object_hook=reduce)
        except (ValueError, RecursionError) as error:
            raise _Passing(f"the answer is torn or no JSON ({self.quote(str(error))})") from None

    def _exchange(
        self, path: str, body: bytes | None, most_bytes: int, halt: Halt
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body; the body's first `most_bytes` + 1 bytes at most."""
        deadline = time.monotonic() + self._timeout_seconds
        headers = {"Connection": "close", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection = self._connection()
        try:
            connection.connect()
            # The connection forgets its socket once the headers of the last answer are in.
            connected = connection.sock
            with halt.shuts(connected):
                connection.request("GET" if body is None else "POST", self._parts.path + path, body, headers)
                with connection.getresponse() as answer:
                    most_bytes = most_bytes if answer.status == 200 else _ERROR_BYTES
                    pieces, read_bytes = [], 0
                    # Piece by piece: a time limit on each read alone never ends for a server that drips.
                    while read_bytes <= most_bytes:
                        connected.settimeout(max(deadline - time.monotonic(), 1e-3))
                        piece = answer.read1(min(_PIECE_BYTES, most_bytes + 1 - read_bytes))
                        if not piece:
                            break
                        pieces.append(piece)
                        read_bytes += len(piece)
                    return answer.status, answer.headers, b"".join(pieces)
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, port or 443, timeout=self._timeout_seconds)
        return http.client.HTTPConnection(host, port or 80, timeout=self._timeout_seconds)


def _address(url: str) -> SplitResult:
    """The API's root, which ends in /v1. Messages leave out what could be a secret."""
    wanted = "distill.teacher.url must be an address as http://host:8000/v1"
    if any(mark in url for mark in "@?#"):
        raise ConfigError(f"{wanted}, without user, password, query or fragment; a key belongs in {KEY_VARIABLE}")
    invalid = ConfigError(f"{wanted}, got {printable(url[:_QUOTED_CHARACTERS])!r}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise invalid
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        if parts.scheme not in ("http", "https") or not host or parts.port == 0:
            raise invalid
    except ValueError:
        raise invalid from None
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith("/v1") else path + "/v1")


def _key_of_environment() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"{KEY_VARIABLE} holds characters that no key has, such as a line break; set it anew")
    return key


def _retry_after_seconds(value: str | None) -> float:
    """Seconds or an HTTP date (RFC 9110, 10.2.3); 0 if there is none."""
    if value is None:
        return 0.0
    try:
        seconds = float(value) if value.strip().isdecimal() else _until(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), _LONGEST_WAIT_SECONDS)


def _until(date: str) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - time.time()


def _message(body: bytes) -> str:
    """What an error's body says: OpenAI's, older vLLM's and FastAPI's forms, else its text."""
    text = body.decode("utf-8", errors="replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
    return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
