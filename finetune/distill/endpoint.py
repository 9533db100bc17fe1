"""Send JSON requests over HTTP with time limits, retries and cancellation."""

from __future__ import annotations

import email.utils
import json
import os
import random
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Event, Lock
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

import httpx

from finetune.system.console import Log, printable
from finetune.system.errors import ConfigError, FinetuneError

KEY_VARIABLE = "OPENAI_API_KEY"

# The server is busy or restarting: the same request may succeed later.
_TRANSIENT_STATUS = frozenset({429, *range(500, 505)})
_LONGEST_BACKOFF_SECONDS = 60.0
_LONGEST_WAIT_SECONDS = 600.0
_ERROR_BYTES = 2**16
_QUOTED_CHARACTERS = 400


class Refusal(Exception):
    """The server answered with an error that a retry cannot change. The message is the server's."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Cancelled(Exception):
    """Raised in threads whose result is no longer needed."""


class _Transient(Exception):
    """A failure that a retry may overcome. Its arguments: the reason, and the least seconds to wait."""


class Cancellation:
    """Cancel the requests of several threads: end their waits and shut their connections."""

    def __init__(self) -> None:
        self._cancelled = Event()
        self._lock = Lock()
        self._open: WeakSet[socket.socket] = WeakSet()  # a connection leaves it with its request

    def cancel(self) -> None:
        with self._lock:
            self._cancelled.set()
            for connected in self._open:
                with suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)

    def wait(self, seconds: float) -> None:
        """Sleep. Raises: Cancelled, at once when another thread cancels."""
        if self._cancelled.wait(seconds):
            raise Cancelled

    def add(self, connected: socket.socket) -> None:
        """Shut this connection on `cancel`. Raises: Cancelled if that was before."""
        with self._lock:
            self._open.add(connected)
        self.wait(0)


class Endpoint:
    """One HTTP API, reached without a proxy, with one connection per request.

    Only this host receives the key in OPENAI_API_KEY: redirects are not followed, and no message contains the key.
    A request is limited to `timeout_seconds` and retried up to `attempts` times. The wait starts at `backoff_seconds`
    and doubles; a Retry-After of the server extends it. Several threads call `log`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 60.0,
        attempts: int = 6,
        backoff_seconds: float = 1.0,
        log: Log = lambda line: None,
    ):
        """Raises: ConfigError if the URL or the key is invalid."""
        self.url = api_root(url, "distill.teacher.url")
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise ConfigError(
                f"{KEY_VARIABLE}: has characters that no key has, such as a line break\nhelp: set it again"
            )
        self._timeout_seconds, self._attempts, self._backoff_seconds = timeout_seconds, attempts, backoff_seconds
        self._log = log
        # A generator of its own: retries must not change the random state of training.
        self._jitter = random.Random()
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx.Client(
            headers=headers,
            timeout=timeout_seconds,
            trust_env=False,
            verify=ssl.create_default_context(),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    def request(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        most_bytes: int,
        cancellation: Cancellation | None = None,
        reduce: Callable[[dict[str, Any]], Any] | None = None,
    ) -> Any:
        """Send a GET, or a POST of `body`, and return the parsed JSON with all numbers as floats.

        Args:
            most_bytes: limit of the answer.
            reduce: replaces each JSON object, innermost first.

        Raises:
            Refusal: a retry cannot help.
            FinetuneError: the last attempt failed, or the answer is larger than `most_bytes`.
            Cancelled: see Cancellation.
        """
        reason, cancellation = "", cancellation or Cancellation()
        for attempt in range(1, self._attempts + 1):
            try:
                answer = self._attempt(path, body, most_bytes, cancellation)
                # An integer of any length has a float, possibly infinite.
                return json.loads(answer, parse_int=float, object_hook=reduce)
            except _Transient as failure:
                reason, wait_seconds = failure.args
            except (ValueError, RecursionError) as error:
                reason, wait_seconds = f"the answer is corrupt or not JSON ({self.quote(str(error))})", 0.0
            cancellation.wait(0)
            if attempt < self._attempts:
                backoff = min(self._backoff_seconds * 2 ** (attempt - 1), _LONGEST_BACKOFF_SECONDS)
                seconds = max(wait_seconds, backoff * self._jitter.uniform(0.5, 1.0))
                self._log(f"{self.url}: {reason}; retry in {seconds:.1f} s, attempt {attempt + 1} of {self._attempts}")
                cancellation.wait(seconds)
        raise FinetuneError(
            f"{self.url}: no answer in {self._attempts} attempts, the last one: {reason}\n"
            "help: check that the server runs, then start again: answers so far are cached"
        )

    def quote(self, text: str) -> str:
        """Quote a server's text on one line: bounded, safe to print, without the key."""
        text = " ".join(text.split())
        if self._key:
            text = text.replace(self._key, "…")
        return printable(text[:_QUOTED_CHARACTERS] + ("…" if len(text) > _QUOTED_CHARACTERS else ""))

    def _attempt(self, path: str, body: Mapping[str, Any] | None, most_bytes: int, cancellation: Cancellation) -> bytes:
        try:
            status, headers, answer = self._exchange(path, body, most_bytes, cancellation)
        except httpx.TimeoutException:
            raise _Transient(f"no answer within {self._timeout_seconds:g} s", 0.0) from None
        except httpx.TransportError as error:
            shown, cause = self.quote(str(error)), error
            while (inner := cause.__cause__ or cause.__context__) is not None:
                cause = inner
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise ConfigError(f"{self.url}: its certificate is not trusted ({shown})") from None
            raise _Transient(f"connection failed ({type(error).__name__}: {shown})", 0.0) from None
        if status != 200:
            message = self.quote(error_message(answer))
            if status in _TRANSIENT_STATUS:
                raise _Transient(f"HTTP {status}: {message}", _retry_after_seconds(headers.get("Retry-After", "")))
            raise Refusal(status, message)
        if len(answer) > most_bytes:
            raise FinetuneError(f"{self.url}: the answer is larger than the limit of {most_bytes:,} bytes")
        return answer

    def _exchange(
        self, path: str, body: Mapping[str, Any] | None, most_bytes: int, cancellation: Cancellation
    ) -> tuple[int, httpx.Headers, bytes]:
        """Return status, headers, and at most `most_bytes` + 1 bytes of the body."""
        deadline = time.monotonic() + self._timeout_seconds

        def on_event(event: str, info: dict[str, Any]) -> None:
            if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
                cancellation.add(info["return_value"].get_extra_info("socket"))

        method = "GET" if body is None else "POST"
        with self._client.stream(method, self.url + path, json=body, extensions={"trace": on_event}) as response:
            most_bytes = most_bytes if response.status_code == 200 else _ERROR_BYTES
            answer = bytearray()
            for piece in response.iter_raw():
                answer += piece
                if len(answer) > most_bytes:
                    break
                # The client limits each read only, which never ends for a server that sends byte by byte.
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer is not complete")
            return response.status_code, response.headers, bytes(answer[: most_bytes + 1])


def api_root(url: str, key: str) -> str:
    """Return the root of the API, which ends in /v1. Messages omit parts that may be secret.

    key: the setting that holds the address.
    Raises: ConfigError.
    """
    expected = f"{key}: expected an address such as http://host:8000/v1"
    if any(mark in url for mark in "@?#"):
        raise ConfigError(f"{expected} without user, password, query or fragment\nhelp: set the key in {KEY_VARIABLE}")
    invalid = ConfigError(f"{expected}, found {printable(url[:_QUOTED_CHARACTERS])!r}")
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
    return parts._replace(path=path if path.endswith("/v1") else path + "/v1").geturl()


def _retry_after_seconds(value: str) -> float:
    """Return seconds of a number or an HTTP date (RFC 9110, 10.2.3); 0 if empty or invalid."""
    try:
        is_number = value.strip().isdecimal()
        seconds = float(value) if is_number else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), _LONGEST_WAIT_SECONDS)


def error_message(body: bytes) -> str:
    """Return the message of an error in OpenAI's, older vLLM's or FastAPI's form, else its text."""
    text = body.decode("utf-8", errors="replace")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(message, dict) and message.get(name):
            message = message[name]
    return message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
