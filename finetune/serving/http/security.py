"""What every request passes before its route: the key, the page that sent it, and the size of its body."""

from __future__ import annotations

import hmac
import ipaddress
import uuid
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.serving.http.errors import ApiError
from finetune.serving.http.json_bodies import JsonReply
from finetune.serving.http.page import PAGE_PATHS

# Probes of life have no key, and the page asks its user for one.
OPEN_PATHS = frozenset({*PAGE_PATHS, "/health", "/ready"})
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses a request without the key, from a page of another site, or with too large a body.

    Without a key, a server on this machine is protected from two kinds of pages in a browser on this machine:
    - A page of another site has another Origin than the Host it asks.
    - A site may point its own name at 127.0.0.1 (DNS rebinding): then Origin and Host agree, and both are its name.
      An address or `localhost` cannot be such a name, so a browser must use one of them.
    A page that asks for an answer always sends its Origin. Programs send none and are not checked. With a key there is
    nothing to check: a page of another site has none.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, most_bytes: int):
        self._app, self._key, self._most_bytes = app, api_key, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = f"req_{uuid.uuid4().hex}"
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check_caller(scope["path"], headers)
            self._check_length(headers)
        except ApiError as error:
            # The body is not read: the connection cannot be used again.
            reply = JsonReply(error.body(), error.status, {**error.headers, "Connection": "close"})
            await reply(scope, receive, send_with_headers)
            return
        await self._app(scope, self._limited(receive), send_with_headers)

    def _check_caller(self, path: str, headers: Mapping[str, str]) -> None:
        if self._key is not None:
            if path not in OPEN_PATHS and not _same(headers.get("authorization", ""), f"Bearer {self._key}"):
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        elif "origin" in headers:
            host = headers.get("host", "")
            if _host_of(headers["origin"]) != host or not _cannot_be_rebound(host):
                raise ApiError(
                    403,
                    "a page may use this server only from its own address, as http://127.0.0.1:8000; "
                    "to use it under another name, start it with a key",
                    code="wrong_origin",
                )

    def _check_length(self, headers: Mapping[str, str]) -> None:
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdecimal() and int(length[:20]) > self._most_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """Count a body as it comes: it may have no length, or a wrong one."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._most_bytes:,} bytes, the limit serve.max_request",
            code="request_too_large",
            headers={"Connection": "close"},
        )


def _same(given: str, expected: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(given.encode("latin-1", "replace"), expected.encode())


def _host_of(origin: str) -> str | None:
    """Return host and port of an Origin; None for `null`, which files and sandboxed frames send."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _cannot_be_rebound(host: str) -> bool:
    """Whether a Host is an address or localhost."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
