"""The bodies that clients send. A key that no request has is refused, so that no setting is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

from finetune.serving.settings import AnswerSettings

# More answers in one request than this would hold the queue against all others.
MOST_ANSWERS = 128
_MOST_LOGPROBS = 20
Text = Annotated[str, StringConstraints(min_length=1)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=500)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
Texts = Annotated[list[Text], Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


def _null_for_absent(schema: dict[str, Any]) -> None:
    """Write into a schema that optional keys may be null, as clients send them."""
    for key, kind in schema.get("properties", {}).items():
        if key not in schema.get("required", ()) and {"type": "null"} not in kind.get("anyOf", ()):
            described = {name: kind.pop(name) for name in ("title", "description", "default") if name in kind}
            schema["properties"][key] = {"anyOf": [*kind.get("anyOf", [kind]), {"type": "null"}]} | described


class Body(BaseModel):
    """A part of a request: strict about types, without unknown keys; null stands for an absent key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_null_for_absent
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


def _part_type(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "text" if kind == "text" else "media"


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class MediaPart(BaseModel):
    """A picture, sound or file, which is refused with a sentence."""

    model_config = ConfigDict(extra="allow")

    type: Literal["image_url", "input_audio", "video_url", "audio_url", "file", "refusal"]


Part = Annotated[Annotated[TextPart, Tag("text")] | Annotated[MediaPart, Tag("media")], Discriminator(_part_type)]


def _content_type(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Field(min_length=1), Tag("parts")],
    Discriminator(_content_type),
]


class CalledFunction(Body):
    """The function of a call. arguments: JSON text of an object."""

    name: FunctionName
    arguments: str


class Call(Body):
    """A call of a tool in an assistant's message."""

    id: str = ""
    type: Literal["function"] = "function"
    index: int = 0
    function: CalledFunction


class _Turn(Body):
    name: str | None = Field(None, description="Accepted and ignored: chat templates have no names.")


class SystemTurn(_Turn):
    """Instructions."""

    role: Literal["system"]
    content: Content


class UserTurn(_Turn):
    """What a person writes."""

    role: Literal["user"]
    content: Content


class AssistantTurn(_Turn):
    """An earlier answer, also as a client got it from this server."""

    role: Literal["assistant"]
    content: Content = ""
    tool_calls: list[Call] = []
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] = Field([], max_length=0)

    @model_validator(mode="after")
    def _has_something(self) -> Self:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


class ToolTurn(_Turn):
    """The result of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str = ""


Turn = Annotated[SystemTurn | UserTurn | AssistantTurn | ToolTurn, Field(discriminator="role")]


class Function(Body):
    """A function that the model may call. parameters: JSON schema of its arguments."""

    name: FunctionName
    description: str = ""
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool = False


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    """A function by its name."""

    name: FunctionName


class ChosenTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class NamedSchema(Body):
    """The JSON schema of an answer."""

    name: FunctionName
    description: str = ""
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool = True


class TextFormat(Body):
    """Free text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Body):
    """JSON that obeys a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(Body):
    """include_usage: one more chunk, with the counts of tokens, before the end."""

    include_usage: bool = False


class Ignored(Body):
    """Keys about accounts and storage at OpenAI; they change no answer, and clients send them by habit."""

    user: str | None = Field(None, description="Accepted and ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted and ignored.")
    store: bool | None = Field(None, description="Accepted and ignored.")
    service_tier: str | None = Field(None, description="Accepted and ignored.")
    safety_identifier: str | None = Field(None, description="Accepted and ignored.")
    prompt_cache_key: str | None = Field(None, description="Accepted and ignored.")


class AnswerBody(AnswerSettings, Ignored):
    """What a chat and a completion have in common.

    temperature: 1 where it is not given, as at OpenAI, whatever the model's generation_config.json holds.
    """

    model_config = Body.model_config

    model: ModelName
    n: int = Field(1, ge=1, le=MOST_ANSWERS, description="Answers to each prompt.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop_token_ids: list[TokenId] = Field([], max_length=128, description="More tokens that end an answer (vLLM).")
    deadline_seconds: float | None = Field(None, gt=0, description="Time of this request, below the server's own.")
    logit_bias: dict[str, float] = Field({}, max_length=0, description="Not supported: it must be empty.")

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for requests with stream=true")
        return self


class ChatBody(AnswerBody):
    """A request to /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="Another name of max_tokens.")
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: Literal["auto", "none", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool = True
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for requests with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; give one of them")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        if isinstance(self.tool_choice, ChosenTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: no function of tools has the name {self.tool_choice.function.name}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required needs tools")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer; None: the rest of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call: the prompt then ends with its start, and a grammar holds for it."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, ChosenTool)


class CompletionBody(AnswerBody):
    """A request to /v1/completions."""

    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1)] = Field(
        description="A text, or its tokens; or a list of such. Control tokens in a text are control tokens."
    )
    max_tokens: int | None = Field(16, ge=0)
    echo: bool = Field(False, description="Put the prompt before the answer.")
    logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)
    prompt_logprobs: int | None = Field(
        None, ge=0, le=2**31, description="The most probable tokens at each token of the prompt (vLLM)."
    )
    return_tokens_as_token_ids: bool = Field(False, description="Name tokens in logprobs token_id:ID (vLLM).")
    best_of: int | None = Field(None, ge=1, description="It must equal n.")
    suffix: None = Field(None, description="Not supported.")

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must equal n: all answers are returned")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is for requests without stream")
        return self


class LoadAdapter(Body):
    """A request to POST /v1/adapters. folder: within serve.adapters_folder; without it, the name."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}$")]
    folder: str | None = Field(None, min_length=1, max_length=255)


class LoadLora(BaseModel):
    """A request to POST /v1/load_lora_adapter, as vLLM has it. lora_path: a folder in serve.adapters_folder."""

    model_config = ConfigDict(frozen=True, strict=True)

    lora_name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}$")]
    lora_path: str = Field(min_length=1, max_length=4096)


class UnloadLora(BaseModel):
    """A request to POST /v1/unload_lora_adapter, as vLLM has it."""

    model_config = ConfigDict(frozen=True, strict=True)

    lora_name: ModelName


def _keys(kind: type[BaseModel]) -> Iterator[str]:
    yield from kind.model_fields
    for inner in kind.__subclasses__():
        yield from _keys(inner)


# All keys of all bodies, for advice at a misspelled one.
KEYS = frozenset({*_keys(Body)} - {"schema_"} | {"schema"})
