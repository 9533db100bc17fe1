"""/v1/chat/completions: conversations to answers, whole or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response

from finetune.serving.engine.grammar import check_schema
from finetune.serving.http.answers import Asked, End, Piece, Written, all_whole, copies, merged, while_connected
from finetune.serving.http.common import Common, usage
from finetune.serving.http.json_bodies import JsonReply
from finetune.serving.http.schemas import ChatBody
from finetune.serving.http.scores import chat_scores
from finetune.serving.http.sse import GONE, event_stream
from finetune.serving.http.tool_use import AnswerParts, grammar_of
from finetune.serving.request import Token
from finetune.serving.service import ServedModel


async def answer_chat(common: Common, http: HttpRequest, body: ChatBody) -> Response:
    """Answer a conversation. Raises: ApiError; as `Service.answer`."""
    model = common.model(body.model)
    if (grammar := grammar_of(body)) is not None:
        await common.prompts.run(check_schema, grammar)
    ids = await common.prompts.run(common.prompts.of_chat, body)
    log_probs = (body.top_logprobs or 0) if body.logprobs else None
    asked = common.asked(body, model, ids, body.limit, log_probs=log_probs, grammar=grammar)
    answers = _Answers(common, body, model, copies(asked, body.n))
    if body.stream:
        return await event_stream(http, answers.chunks())
    reply = await while_connected(http, answers.whole())
    return Response(status_code=GONE) if reply is None else JsonReply(reply)


class _Answers:
    """The answers to one conversation."""

    def __init__(self, common: Common, body: ChatBody, model: ServedModel, asked: list[Asked]):
        self._common, self._body, self._asked = common, body, asked
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
        texts = AnswerParts(self._body)
        content, calls = texts.push(written.text)
        rest, last = texts.finish(written.end.reason)
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
        texts = [AnswerParts(self._body) for _ in self._asked]
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
                for delta in _deltas(texts[number], *texts[number].finish(each.reason)):
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


def _deltas(texts: AnswerParts, content: str, calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = [{"content": content}] if content else []
    first = texts.calls - len(calls)
    return deltas + [{"tool_calls": [{"index": first + i, **call}]} for i, call in enumerate(calls)]
