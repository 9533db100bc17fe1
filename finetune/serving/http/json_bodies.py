"""JSON in and out: bodies are read strictly and within limits, answers are written without pydantic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from finetune.serving.http.errors import ApiError

_DEEPEST = 100
_TYPE = "application/json"


class JsonReply(Response):
    """An answer of plain dicts and lists."""

    media_type = _TYPE

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None):
        super().__init__(content if isinstance(content, bytes) else as_json(content), status, headers)


def as_json(content: Any) -> bytes:
    """Write JSON. Raises: ValueError for NaN and infinity, which JSON has not."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


class JsonRoute(APIRoute):
    """A route whose body is strict JSON.

    Only `application/json` is read: a page of another site cannot send it without a preflight, which is refused.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            if self.body_field is None:
                return await handle(request)
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != _TYPE:
                found = f"found {kind}" if kind else "found none"
                raise ApiError(415, f"the Content-Type must be {_TYPE}, {found}", code="unsupported_media_type")
            return await handle(_Parsed(request, parse_json(await request.body())))

        return read_and_handle


class _Parsed(Request):
    """A request with the content of its body."""

    def __init__(self, request: Request, content: Any):
        super().__init__(request.scope, request.receive)
        self._body, self._json = b"parsed", content


def parse_json(raw: bytes) -> Any:
    """Parse a body.

    Raises: ApiError (400) for what is no JSON, and for JSON that programs read differently or cannot write again:
        duplicate keys, NaN, numbers without end, half surrogate pairs, or lists within lists beyond a limit.
    """
    if not raw:
        raise _refused("it is empty; it must be a JSON object")
    try:
        content = json.loads(
            raw.decode(), object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite_float
        )
    except UnicodeDecodeError as error:
        raise _refused(f"it is not UTF-8, at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _refused(f"it is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _refused(f"it is nested deeper than {_DEEPEST} levels") from None
    except ValueError:
        raise _refused("a number has thousands of digits") from None
    if raw.count(b"[") + raw.count(b"{") > _DEEPEST and _depth(content) > _DEEPEST:
        raise _refused(f"it is nested deeper than {_DEEPEST} levels")
    if b"\\u" in raw:
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _refused("a text has half a surrogate pair") from None
    return content


def _refused(problem: str) -> ApiError:
    return ApiError(400, f"the body cannot be read: {problem}", code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _refused(f"the key {twice[:60]!r} occurs twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise _refused(f"{name} is no JSON")


def _finite_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise _refused("a number is too large for a 64-bit float")
    return number


def _depth(content: Any) -> int:
    """Count the levels of lists and objects, until there are too many."""
    depth, level = 0, [content]
    while level and depth <= _DEEPEST:
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        depth += bool(inner)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return depth
