"""Requests of clients become prompts of tokens, in a thread of their own so that long texts delay no stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from finetune.data.formats.messages import Message, ToolCall
from finetune.data.template.chat import ChatTemplate
from finetune.data.template.layout import control_pattern
from finetune.serving.http.errors import ApiError
from finetune.serving.http.schemas import AssistantTurn, Call, ChatBody, Content, Function, MediaPart, Tool, Turn
from finetune.serving.tool_calls import OPEN
from finetune.system.errors import DataError

# The model's own words before a call, after which a grammar holds for the call's JSON.
CALL_START = f"{OPEN}\n"


class Prompts:
    """Encodes prompts with the template and the tokenizer of the base."""

    def __init__(self, chat: ChatTemplate):
        self._chat = chat
        # One thread: a ChatTemplate keeps layouts of conversations, without a lock.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run work on long texts in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def of_chat(self, body: ChatBody) -> tuple[int, ...]:
        """Return the prompt of a conversation, with the start of a call that must follow.

        Raises: ApiError if the template refuses the conversation or has no tools, or a message has media.
        """
        tools = [_schema(tool) for tool in body.offered_tools]
        if tools and not self._has_tools:
            raise ApiError(400, f"tools: the chat template of {body.model} has no tools", param="tools")
        messages = [_message(turn, f"messages[{i}]", body.model) for i, turn in enumerate(body.messages)]
        try:
            ids = self._chat.prompt_ids(messages, tools)
        except DataError as error:
            raise ApiError(400, f"messages: {error}", param="messages", code="invalid_value") from error
        return (*ids, *(self._text_ids(CALL_START) if body.must_call else ()))

    def of_completion(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Return the tokens of one prompt. Raises: ApiError for an id that the vocabulary has not."""
        if isinstance(prompt, str):
            return (*self._chat.text_start, *self._text_ids(prompt))
        if max(prompt, default=0) >= self._chat.vocabulary_size:
            raise ApiError(
                400, f"prompt: the vocabulary ends at {self._chat.vocabulary_size}, found {max(prompt)}", param="prompt"
            )
        return tuple(prompt)

    @cached_property
    def _has_tools(self) -> bool:
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        question = [Message("user", "a")]
        try:
            return self._chat.prompt_ids(question, [tool]) != self._chat.prompt_ids(question)
        except DataError:
            return False

    def _text_ids(self, text: str) -> list[int]:
        """Encode a text whose control tokens are control tokens, as every server does with a whole prompt."""
        control, at, ids = self._chat.control_ids, 0, []
        for found in self._control.finditer(text):
            ids += [*self._plain_ids(text[at : found.start()]), control[found.group()]]
            at = found.end()
        return [*ids, *self._plain_ids(text[at:])]

    @cached_property
    def _control(self) -> Any:
        return control_pattern(list(self._chat.control_ids))

    def _plain_ids(self, text: str) -> list[int]:
        return self._chat.encode_texts([text])[0].tolist() if text else []


def _schema(tool: Tool) -> dict[str, Any]:
    function: Function = tool.function
    described = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {"type": "function", "function": {key: value for key, value in described.items() if value != ""}}


def _message(turn: Turn, place: str, model: str) -> Message:
    calls = turn.tool_calls if isinstance(turn, AssistantTurn) else []
    content = _text(turn.content, f"{place}.content", model)
    return Message(turn.role, content, tuple(_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)))


def _text(content: Content, place: str, model: str) -> str:
    """Join the parts of a content, as chat templates do."""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, MediaPart):
            param = f"{place}[{i}]"
            raise ApiError(400, f"{param}: {model} reads text only, found {part.type}", param=param)
        texts.append(part.text)
    return "".join(texts)


def _call(call: Call, place: str) -> ToolCall:
    param = f"{place}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{param}: it must be the JSON text of an object", param=param)
    return ToolCall(call.function.name, arguments)
