"""/v1/chat/completions: conversations to answers, whole or as a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response

from finetune.serving.engine.grammar import JSON_OBJECT, check_schema
from finetune.serving.http.answers import Asked, End, Piece, Written, all_whole, copies, merged, while_connected
from finetune.serving.http.common import Common, usage
from finetune.serving.http.errors import ApiError
from finetune.serving.http.json_bodies import JsonReply
from finetune.serving.http.prompts import CALL_START, offered_tools
from finetune.serving.http.schemas import ChatBody, ChosenTool, ObjectFormat, SchemaFormat
from finetune.serving.http.scores import chat_scores
from finetune.serving.http.sse import GONE, event_stream
from finetune.serving.request import Token
from finetune.serving.service import ServedModel
from finetune.serving.tool_calls import ToolCallParser


async def answer_chat(common: Common, http: HttpRequest, body: ChatBody) -> Response:
    """Answer a conversation. Raises: ApiError; as `Service.answer`."""
    model = common.model(body.model)
    if (grammar := grammar_of(body)) is not None:
        await common.prompts.run(check_schema, grammar)
    forced = body.tool_choice == "required" or isinstance(body.tool_choice, ChosenTool)
    ids = await common.prompts.run(lambda: common.prompts.of_chat(body, forced=forced))
    log_probs = (body.top_logprobs or 0) if body.logprobs else None
    limit = body.max_completion_tokens or body.max_tokens
    asked = common.asked(body, model, ids, limit, log_probs=log_probs, grammar=grammar)
    answers = _Answers(common, body, model, copies(asked, body.n), forced)
    if body.stream:
        return await event_stream(http, answers.chunks())
    reply = await while_connected(http, answers.whole())
    return Response(status_code=GONE) if reply is None else JsonReply(reply)


def grammar_of(body: ChatBody) -> str | None:
    """Return the JSON schema that the answer must obey. Raises: ApiError for two of them."""
    wanted = body.response_format
    schema = JSON_OBJECT if isinstance(wanted, ObjectFormat) else None
    if isinstance(wanted, SchemaFormat):
        schema = json.dumps(wanted.json_schema.schema_)
    tools = offered_tools(body)
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
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})


class _Texts:
    """Separates the text of one answer from its calls of tools.

    forced: the prompt ends with the start of a call, so the answer begins within it.
    """

    def __init__(self, body: ChatBody, forced: bool):
        self._parser = ToolCallParser() if offered_tools(body) else None
        self._forced, self._one = forced, not body.parallel_tool_calls
        self.calls = 0
        if forced and self._parser is not None:
            self._parser.push(CALL_START)

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Return the content and the calls that are complete now."""
        return (text, []) if self._parser is None else self._split(self._parser.push(text))

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        if self._parser is None:
            return "", []
        rest = self._parser.push("\n</tool_call>") if self._forced else []
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


class _Answers:
    """The answers to one conversation."""

    def __init__(self, common: Common, body: ChatBody, model: ServedModel, asked: list[Asked], forced: bool):
        self._common, self._body, self._asked, self._forced = common, body, asked, forced
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": f"fp_{model.digest[:16]}",
        }

    async def whole(self) -> dict[str, Any]:
        """Return the body of all answers."""
        written = await all_whole(self._common.service, self._asked)
        choices = [self._choice(number, each) for number, each in enumerate(written)]
        return self._head | {"choices": choices, "usage": usage(self._asked[:1], [each.end for each in written])}

    def _choice(self, number: int, written: Written) -> dict[str, Any]:
        texts = _Texts(self._body, self._forced)
        content, calls = texts.push(written.text)
        rest, last = texts.finish()
        content, calls = content + rest, calls + last
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        message["refusal"] = None
        if calls:
            message["tool_calls"] = calls
        return {
            "index": number,
            "message": message,
            "logprobs": self._scores(written.tokens),
            "finish_reason": "tool_calls" if calls else written.end.reason,
        }

    def _scores(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_scores(self._common.names, tokens, self._body.top_logprobs or 0)

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of all answers."""
        counted = self._body.stream_options is not None and self._body.stream_options.include_usage
        # Every chunk has the key: OpenAI writes null before the one with the counts.
        head = self._head | {"usage": None} if counted else self._head
        texts = [_Texts(self._body, self._forced) for _ in self._asked]
        ends: dict[int, End] = {}
        held: dict[int, list[Token]] = {}  # tokens of a text that is not sent yet, such as the start of a call
        async for number, each in merged(self._common.service, self._asked):
            if number not in held:
                held[number] = []
                yield self._chunk(head, number, {"role": "assistant", "content": "", "refusal": None})
            if isinstance(each, Piece):
                held[number] += each.tokens
                for delta in _deltas(texts[number], *texts[number].push(each.text)):
                    yield self._chunk(head, number, delta, held[number])
                    held[number] = []
            elif isinstance(each, End):
                for delta in _deltas(texts[number], *texts[number].finish()):
                    yield self._chunk(head, number, delta, held[number])
                    held[number] = []
                ends[number] = each
                reason = "tool_calls" if texts[number].calls else each.reason
                yield self._chunk(head, number, {}, held[number], reason=reason)
        if counted:
            yield head | {"choices": [], "usage": usage(self._asked[:1], [ends[number] for number in sorted(ends)])}

    def _chunk(
        self,
        head: dict[str, Any],
        number: int,
        delta: dict[str, Any],
        tokens: Sequence[Token] = (),
        *,
        reason: str | None = None,
    ) -> dict[str, Any]:
        scores = self._scores(tokens) if tokens else None
        return head | {"choices": [{"index": number, "delta": delta, "logprobs": scores, "finish_reason": reason}]}


def _deltas(texts: _Texts, content: str, calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = [{"content": content}] if content else []
    first = texts.calls - len(calls)
    return deltas + [{"tool_calls": [{"index": first + i, **call}]} for i, call in enumerate(calls)]
