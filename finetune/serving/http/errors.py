"""Every failure of a request as OpenAI's error body, with one plain sentence and no traceback."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from finetune.serving.admission import DeadlineExceeded, Overloaded, Unavailable
from finetune.serving.http.schemas import KEYS
from finetune.system.arguments import nearest
from finetune.system.errors import FinetuneError, InputError

_MOST_PROBLEMS = 5
_QUOTED_CHARACTERS = 60
_SENTENCES = {404: "there is no such path", 405: "the path has no such method"}


class ErrorDetails(TypedDict):
    """What OpenAI's clients read from a failed request. param: the key of the request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every failed request, and of an error within a stream."""

    error: ErrorDetails


class ApiError(Exception):
    """A request that gets an error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def body(self) -> ErrorBody:
        """Return the body, which is also the event of an error within a stream."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """Return what a client sees of an error. Of an unknown one it sees nothing: its text may hold paths."""
    match error:
        case ApiError():
            return error
        case Overloaded():
            status, code = (503, "unavailable") if isinstance(error, Unavailable) else (429, "overloaded")
            return ApiError(status, str(error), code=code, headers={"Retry-After": str(error.retry_after_seconds)})
        case DeadlineExceeded():
            return ApiError(504, str(error), code="deadline_exceeded")
        case InputError():
            return ApiError(400, str(error), code="invalid_value")
        case FinetuneError():
            return ApiError(500, str(error), code="engine_error")
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            sentence = _SENTENCES.get(error.status_code, str(error.detail))
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
            return ApiError(error.status_code, sentence, code=code, headers=error.headers)
    return ApiError(500, "the server failed at this request; its log has the reason", code="internal_error")


def _invalid(error: RequestValidationError) -> ApiError:
    """Join the problems of a body; a key that accepts several types has one problem for each of them."""
    found: dict[str, dict[str, None]] = {}
    for problem in error.errors():
        path, text = _problem(problem, error.body)
        found.setdefault(path, {})[text] = None
    lines = [f"{path}: {' or '.join(texts)}" if path else " or ".join(texts) for path, texts in found.items()]
    rest = len(lines) - _MOST_PROBLEMS
    message = "; ".join(lines[:_MOST_PROBLEMS]) + (f"; and {rest} more" if rest > 0 else "")
    code = "unknown_parameter" if error.errors()[0]["type"] == "extra_forbidden" else "invalid_value"
    return ApiError(400, message, code=code, param=next(iter(found)) or None)


def _problem(problem: Mapping[str, Any], body: Any) -> tuple[str, str]:
    """Return the path of a key, as messages[0].content, and what is wrong there."""
    kind, location = problem["type"], problem["loc"]
    where = location[0] if location and location[0] in ("path", "query", "header") else None
    path = str(location[-1]) if where else _path(location[1:], body, kind)
    if kind == "missing":
        return path, "it is missing"
    if kind == "extra_forbidden":
        return path, f"no key has this name{nearest(str(location[-1]), KEYS)}"
    text = re.sub(r"^(Value error, |Assertion failed, )", "", problem["msg"])
    text = text.replace("Input should be", "it must be", 1)
    return path, f"{text}{_shown(problem.get('input'))}"


def _path(location: Sequence[str | int], body: Any, kind: str) -> str:
    """Write a location of pydantic without the names of the types that it tried."""
    path = ""
    for number, step in enumerate(location):
        last = number == len(location) - 1
        if isinstance(body, dict) and (step in body or (last and kind == "missing")):
            path += f".{step}" if path else str(step)
            body = body.get(step)
        elif isinstance(body, list) and isinstance(step, int) and step < len(body):
            path, body = f"{path}[{step}]", body[step]
    return path


def _shown(value: Any) -> str:
    """Quote a wrong value, if it is short."""
    if isinstance(value, dict | list):
        return ""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a number of many digits"
    return f", found {text if len(text) <= _QUOTED_CHARACTERS else text[:_QUOTED_CHARACTERS] + '…'}"
