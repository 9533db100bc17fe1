"""A request of the Open Inference Protocol, read into the same answers as the bodies of the HTTP API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from finetune.serving.engine.grammar import check_schema
from finetune.serving.http.answers import Asked
from finetune.serving.http.common import Common
from finetune.serving.http.errors import ApiError
from finetune.serving.http.json_bodies import parse_json
from finetune.serving.http.schemas import MOST_ANSWERS, ChatBody, CompletionBody
from finetune.serving.http.tool_use import grammar_of
from finetune.serving.tensors import OUTPUTS, read_inputs
from finetune.system.errors import InputError

_MICROSECONDS = 1e-6
# What the tensors of this protocol say otherwise, or have no place for.
_OF_HTTP = frozenset(
    "model prompt messages n best_of stream stream_options echo suffix logprobs top_logprobs prompt_logprobs "
    "return_tokens_as_token_ids tool_choice parallel_tool_calls".split()
)
# By it, a client of Triton says that it reads the parameter of the last response.
_READS_THE_END = "triton_enable_empty_final_response"
# By the flag of an input, the output that it adds.
_ADDED = {
    "return_finish_reason": "finish_reason",
    "return_cumulative_logprob": "cumulative_logprob",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
}


@dataclass(frozen=True, slots=True)
class Inference:
    """What one message asks.

    asked, prefixes: of each prompt: its answer, and the text before the answer. outputs: names of an answer's tensors.
    """

    model: str
    id: str
    asked: list[Asked]
    prefixes: list[str]
    outputs: tuple[str, ...]
    stream: bool


def read_inference(request: Any, common: Common, seconds: float | None) -> Inference:
    """Read a ModelInferRequest.

    Args:
        seconds: the deadline of the call; None: none.

    Raises:
        ApiError, InputError or RequestValidationError: naming the tensor or the setting that is wrong.
    """
    inputs = read_inputs(request)
    given = [name for name in ("text_input", "messages") if name in inputs]
    if len(given) != 1:
        raise InputError("text_input: a request has either this input or messages")
    texts = inputs[given[0]]
    if len(texts) > MOST_ANSWERS:
        raise InputError(f"{given[0]}: at most {MOST_ANSWERS} prompts in one request, found {len(texts)}")
    columns = {name: _for_each(name, values, len(texts)) for name, values in inputs.items()}
    stream = columns.get("stream", [False])[0]
    if stream and len(texts) > 1:
        raise InputError(f"stream: needs one prompt in each request, found {len(texts)}")
    excluded = columns.get("exclude_input_in_output", [stream] * len(texts))
    if stream and not excluded[0]:
        raise InputError("exclude_input_in_output: must be true with stream")
    parameters = _parameters(request.parameters)
    seconds = _least(seconds, _timeout(parameters.pop("timeout", None)))
    outputs = _outputs([output.name for output in request.outputs], columns)
    log_probs = 0 if "cumulative_logprob" in outputs else None
    asked = []
    for text, own in zip(texts, columns.get("sampling_parameters", ["{}"] * len(texts)), strict=True):
        values = parameters | _json("sampling_parameters", own)
        if refused := sorted(_OF_HTTP & values.keys()):
            raise InputError(f"{refused[0]}: the tensors of this protocol have no such setting")
        found = (_of_prompt if given[0] == "text_input" else _of_messages)(request, common, values, text, log_probs)
        asked.append(replace(found, seconds=_least(found.seconds, seconds)))
    shown = [given[0] == "text_input" and not without for without in excluded]
    prefixes = [text if before else "" for text, before in zip(texts, shown, strict=True)]
    return Inference(request.model_name, request.id, asked, prefixes, outputs, stream)


def _of_prompt(request: Any, common: Common, values: Mapping[str, Any], text: str, log_probs: int | None) -> Asked:
    body = _body(CompletionBody, {**values, "model": request.model_name, "prompt": text})
    ids = common.prompts.of_completion(text)
    return common.asked(body, common.model(body.model), ids, body.max_tokens, log_probs=log_probs)


def _of_messages(request: Any, common: Common, values: Mapping[str, Any], text: str, log_probs: int | None) -> Asked:
    body = _body(ChatBody, {**values, "model": request.model_name, "messages": _json("messages", text)})
    if (grammar := grammar_of(body)) is not None:
        check_schema(grammar)
    ids = common.prompts.of_chat(body)
    return common.asked(body, common.model(body.model), ids, body.limit, log_probs=log_probs, grammar=grammar)


def _body(kind: Any, values: Mapping[str, Any]) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems, body=values) from error


def _for_each(name: str, values: list[Any], count: int) -> list[Any]:
    """Return one element for each prompt. Raises: InputError if there is another number, and more than one."""
    if len(values) == count:
        return values
    if len(values) == 1:
        return values * count
    raise InputError(f"{name}: has {len(values)} elements for {count} prompts; it must have one, or one for each")


def _outputs(named: list[str], columns: Mapping[str, list[bool]]) -> tuple[str, ...]:
    """Return the tensors of an answer: those that the request names, else its text and what its flags add."""
    if unknown := [name for name in named if name not in OUTPUTS]:
        raise InputError(f"{unknown[0]}: no output has this name; there are: {', '.join(OUTPUTS)}")
    return tuple(named) or ("text_output", *(output for flag, output in _ADDED.items() if any(columns.get(flag, ()))))


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    for name, parameter in parameters.items():
        if name == _READS_THE_END:
            continue
        if (kind := parameter.WhichOneof("parameter_choice")) is None:
            raise InputError(f"{name}: this parameter has no value")
        values[name] = getattr(parameter, kind)
    return values


def _timeout(microseconds: Any) -> float | None:
    """Return the seconds of Triton's parameter; 0 is no limit."""
    if microseconds is None or microseconds == 0:
        return None
    if not isinstance(microseconds, int) or isinstance(microseconds, bool) or microseconds < 0:
        raise InputError(f"timeout: must be a number of microseconds, found {microseconds!r}")
    return microseconds * _MICROSECONDS


def _least(*limits: float | None) -> float | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _json(name: str, text: str) -> Any:
    """Return the object of sampling_parameters, or the list of messages."""
    try:
        value = parse_json(text.encode())
    except ApiError as error:
        raise InputError(f"{name}: {error}") from error
    if name == "sampling_parameters" and not isinstance(value, dict):
        raise InputError(f"{name}: must be the JSON text of an object, found {type(value).__name__}")
    return value
