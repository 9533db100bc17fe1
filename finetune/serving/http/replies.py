"""The bodies of answers, as types for the OpenAPI document: they are built as plain dicts."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other one on Python 3.11

FinishReason = Literal["stop", "length", "tool_calls"]


class CachedTokens(TypedDict):
    """Tokens of the prompt that were not computed again."""

    cached_tokens: int


class Usage(TypedDict):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ScoredToken(TypedDict):
    """A token and its log-probability. bytes: a token may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ScoredToken):
    """A token of an answer with the most probable ones in its place."""

    top_logprobs: list[ScoredToken]


class ChatScores(TypedDict):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatToken]
    refusal: None


class CalledFunction(TypedDict):
    """A call. arguments: JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    """An answer. content: null where there are only calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """One of n answers."""

    index: int
    message: ChatMessage
    logprobs: ChatScores | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionScores(TypedDict):
    """Log-probabilities in the format of completions. The first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptScore(TypedDict):
    """The score of a token of the prompt. rank: 1 for the most probable one; null beyond those that are listed."""

    logprob: float
    rank: int | None
    decoded_token: str


class CompletionChoice(TypedDict):
    """One answer to one prompt."""

    index: int
    text: str
    logprobs: CompletionScores | None
    finish_reason: FinishReason
    prompt_logprobs: NotRequired[list[dict[str, PromptScore] | None]]


class Completion(TypedDict):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(TypedDict):
    """A model by its name. parent: of an adapter. details: how it was compared with the trained model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    details: dict[str, Any]


class Models(TypedDict):
    """The base and every adapter."""

    object: Literal["list"]
    data: list[Model]


class Deleted(TypedDict):
    """A model that is not served any more."""

    id: str
    object: Literal["model"]
    deleted: bool


class State(TypedDict):
    """The state of the server."""

    status: str
