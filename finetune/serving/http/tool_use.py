"""Calls of tools and answers in JSON: the grammar that a request asks for, and the calls in its answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from finetune.serving.engine.grammar import JSON_OBJECT
from finetune.serving.http.errors import ApiError
from finetune.serving.http.prompts import CALL_START
from finetune.serving.http.schemas import ChatBody, ChosenTool, Function, ObjectFormat, SchemaFormat
from finetune.serving.tool_calls import CLOSE, ToolCallParser

_CALL_END = f"\n{CLOSE}"


def grammar_of(body: ChatBody) -> str | None:
    """Return the JSON schema that the answer must obey. Raises: ApiError for two of them."""
    wanted = body.response_format
    schema = JSON_OBJECT if isinstance(wanted, ObjectFormat) else None
    if isinstance(wanted, SchemaFormat):
        schema = json.dumps(wanted.json_schema.schema_)
    tools = body.offered_tools
    if schema is not None and tools:
        raise ApiError(
            400,
            "response_format: JSON of a schema and calls of tools exclude each other; set tool_choice to none",
            param="response_format",
        )
    chosen = body.tool_choice
    if isinstance(chosen, ChosenTool):
        tools = [tool for tool in tools if tool.function.name == chosen.function.name]
    elif chosen != "required":
        return schema
    return json.dumps({"anyOf": [_call_schema(tool.function, f"#/anyOf/{i}") for i, tool in enumerate(tools)]})


def _call_schema(function: Function, place: str) -> dict[str, Any]:
    """Return the schema of a call's JSON, which stands at `place` in the whole schema."""
    arguments = _moved(function.parameters, f"{place}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references to itself hold where it stands now."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, place)
        for key, value in schema.items()
    }


class AnswerParts:
    """Separates the text of one answer from its calls of tools."""

    def __init__(self, body: ChatBody):
        self._parser = ToolCallParser() if body.offered_tools else None
        self._forced, self._one = body.must_call, not body.parallel_tool_calls
        self.calls = 0
        if self._forced and self._parser is not None:
            self._parser.push(CALL_START)

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Return the content and the calls that are complete now."""
        return (text, []) if self._parser is None else self._split(self._parser.push(text))

    def finish(self, reason: str) -> tuple[str, list[dict[str, Any]]]:
        """Return the rest. reason: why the answer ended; a forced call that was cut off is text."""
        if self._parser is None:
            return "", []
        rest = self._parser.push(_CALL_END) if self._forced and reason == "stop" else []
        return self._split([*rest, *self._parser.finish()])

    def _split(self, found: Sequence[Any]) -> tuple[str, list[dict[str, Any]]]:
        content, calls = "", []
        for each in found:
            if isinstance(each, str):
                content += each
            elif not (self._one and self.calls):
                function = {"name": each.name, "arguments": each.arguments}
                calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
                self.calls += 1
        return content, calls
