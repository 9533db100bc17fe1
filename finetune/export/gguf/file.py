"""GGUF files, written and proved a few rows at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.export.exporter import ExportRequest
from finetune.export.gguf.types import NumberType, decode, encode, gguf_package
from finetune.system.errors import IntegrityError

_CHUNK_NUMBERS = 1 << 22
# What a scale loses when it becomes an f16: a share of the largest number, and something where it is subnormal.
_SCALE_SHARE, _SCALE_FLOOR = 2.0**-10, 127 * 2.0**-24


@dataclass(frozen=True)
class PlannedTensor:
    """name: in the file. source: what it is made of, for messages. rows: rows [start, stop) of the source."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: NumberType
    rows: Callable[[int, int], Tensor]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows that hold about as many numbers as fit into 16 MiB."""
        step = max(1, _CHUNK_NUMBERS // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.kind.row_bytes(self.shape[-1]))

    def encoded(self) -> np.ndarray:
        """The tensor's bytes in the file. Raises: as `encode`."""
        data = np.empty(self.byte_shape, np.uint8)
        width = self.kind.row_bytes(1) if len(self.shape) == 1 else 1
        for start, stop in self.chunks():
            data[start * width : stop * width] = encode(self.rows(start, stop), self.kind, self.source)
        return data


def file_name(request: ExportRequest, kind: NumberType) -> str:
    """`<name>-<type>.gguf`, the name being that of the folder that is asked for."""
    return f"{model_name(request)}-{kind.name}.gguf"


def model_name(request: ExportRequest) -> str:
    """The last part of the folder that is asked for, without what file names and Ollama dislike."""
    name = "".join(
        sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "-" for sign in final_folder(request).name
    )
    return name.strip(".-") or "model"


def final_folder(request: ExportRequest) -> Path:
    """Where the files will be in the end; `job.out` may have another name until they are whole."""
    return Path(request.options.out).expanduser()


def write_file(path: Path, writer: Any, tensors: list[PlannedTensor]) -> dict[str, Any]:
    """Writes a GGUF file; one encoded tensor is in memory at a time.

    writer: a `gguf.GGUFWriter` that knows its entries. Returns: the entries, for `check_file`.
    Raises: as `encode`.
    """
    entries = {key: value.value for key, value in writer.kv_data[0].items()}
    for tensor in tensors:
        size = math.prod(tensor.byte_shape)
        writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), size, raw_dtype=tensor.kind.ggml)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.encoded())
    finally:
        writer.close()
    return entries


def check_file(path: Path, entries: dict[str, Any], tensors: list[PlannedTensor]) -> None:
    """Reads a file with the gguf package and proves every entry and every number of it against the source.

    Types that round each number alone must hold torch's own rounding of the source; block types may be off by the half
    step or, at an end of their range, the step that they have.
    Raises: IntegrityError with everything that differs.
    """
    reader = gguf_package().GGUFReader(path)
    there = {tensor.name: tensor for tensor in reader.tensors}
    problems = [f"{key} is not what was written" for key, value in entries.items() if not _is_there(reader, key, value)]
    problems += [f"{name} is superfluous" for name in sorted(there.keys() - {tensor.name for tensor in tensors})]
    for tensor in tensors:
        if tensor.name not in there:
            problems.append(f"{tensor.name} is missing")
        elif not _holds(there[tensor.name], tensor):
            problems.append(f"{tensor.name} is not {tensor.source} in {tensor.kind.name}")
    if problems:
        raise IntegrityError(f"{path.name} was written wrongly: {'; '.join(problems[:10])}; nothing was kept")


def _is_there(reader: Any, key: str, value: Any) -> bool:
    field = reader.get_field(key)
    found = None if field is None else field.contents()
    return found == (float(np.float32(value)) if isinstance(value, float) else value)


def _holds(found: Any, planned: PlannedTensor) -> bool:
    if found.tensor_type != planned.kind.ggml or tuple(int(size) for size in found.shape[::-1]) != planned.shape:
        return False
    # The reader shows f32 and f16 as such, all others as bytes.
    data = found.data.reshape(planned.shape[0], -1) if len(planned.shape) > 1 else found.data
    return all(
        _close(decode(data[start:stop].view(np.uint8), planned.kind), planned.rows(start, stop).float(), planned.kind)
        for start, stop in planned.chunks()
    )


def _close(found: Tensor, source: Tensor, kind: NumberType) -> bool:
    found = found.reshape(source.shape)
    if kind.block == 1:
        rounded = {"f32": source, "f16": source.half().float(), "bf16": source.bfloat16().float()}[kind.name]
        return torch.equal(found, rounded)
    blocks = source.view(-1, kind.block)
    limit = blocks.abs().amax(dim=1, keepdim=True) * (kind.worst + _SCALE_SHARE) + _SCALE_FLOOR
    return bool(((found.view(-1, kind.block) - blocks).abs() <= limit).all())


def types_used(tensors: list[PlannedTensor]) -> dict[str, int]:
    """How many tensors each type has."""
    return dict(Counter(tensor.kind.name for tensor in tensors))
