"""Tensors of the Open Inference Protocol, named as in the LLM back ends of Triton: read, and put into answers.

Every tensor has one element for each prompt. A setting may have one element for all prompts.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.system.console import printable
from finetune.system.errors import InputError

INPUTS = {
    "text_input": "BYTES",
    "messages": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_cumulative_logprob": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
_FORMATS = {"FP32": "f", "UINT32": "I"}
_SHOWN_CHARACTERS = 100


def read_inputs(request: Any) -> dict[str, list[Any]]:
    """Return the texts and booleans of a ModelInferRequest by the name of their tensor.

    Raises:
        InputError: a tensor is unknown, has another type than `INPUTS` says, or its content does not fit its shape.
    """
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"raw_input_contents: has {len(raw)} elements for {len(request.inputs)} inputs")
    values: dict[str, list[Any]] = {}
    for number, tensor in enumerate(request.inputs):
        name = printable(tensor.name[:_SHOWN_CHARACTERS], one_line=True)
        if tensor.name not in INPUTS:
            raise InputError(f"{name}: no input has this name; there are: {', '.join(INPUTS)}")
        if name in values:
            raise InputError(f"{name}: the request has this input twice")
        if tensor.parameters:
            raise InputError(f"{name}: inputs have no parameters here; shared memory is not supported")
        if tensor.datatype != INPUTS[name]:
            raise InputError(f"{name}: must have the type {INPUTS[name]}, found {printable(tensor.datatype)[:20]!r}")
        values[name] = _elements(tensor, raw[number] if raw else None)
        if len(values[name]) != math.prod(tensor.shape) or not values[name]:
            shape = list(tensor.shape)[:8]
            raise InputError(f"{name}: its shape is {shape}, and its content has {len(values[name])} elements")
    return values


def put_outputs(response: Any, values: Mapping[str, Sequence[Any]]) -> None:
    """Add tensors [N] to a ModelInferResponse. Texts are strings."""
    for name, elements in values.items():
        kind = OUTPUTS[name]
        response.outputs.add(name=name, datatype=kind, shape=[len(elements)])
        if kind == "BYTES":
            texts = [text.encode() for text in elements]
            raw = b"".join(struct.pack("<I", len(text)) + text for text in texts)
        else:
            raw = struct.pack(f"<{len(elements)}{_FORMATS[kind]}", *elements)
        response.raw_output_contents.append(raw)


def _elements(tensor: Any, raw: bytes | None) -> list[Any]:
    contents = tensor.contents
    if raw is not None and tensor.HasField("contents"):
        raise InputError(f"{tensor.name}: has both contents and raw_input_contents")
    if tensor.datatype == "BOOL":
        return [byte != 0 for byte in raw] if raw is not None else list(contents.bool_contents)
    elements = list(contents.bytes_contents) if raw is None else _unpacked(tensor.name, raw)
    try:
        return [element.decode() for element in elements]
    except UnicodeDecodeError as error:
        raise InputError(f"{tensor.name}: is not UTF-8 ({error.reason})") from error


def _unpacked(name: str, raw: bytes) -> list[bytes]:
    """Return the elements of a tensor of bytes; each begins with its length in 4 bytes, the least significant first."""
    elements, at = [], 0
    while at < len(raw):
        start = at + 4
        length = int.from_bytes(raw[at:start], "little")
        at = start + length
        if at > len(raw):
            raise InputError(f"{name}: its content ends within an element")
        elements.append(raw[start:at])
    return elements
