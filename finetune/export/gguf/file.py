"""Write GGUF files and verify them, some rows at a time."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.export.exporter import ExportRequest
from finetune.export.gguf.types import ROUNDED_BY_LLAMA, TYPES, NumberType, decode, encode, gguf_package
from finetune.system.errors import IntegrityError
from finetune.system.format import format_bytes

_CHUNK_VALUES = 1 << 22
# Rounding a scale to f16 loses this share of the largest value, and this much where the scale is subnormal.
_SCALE_SHARE, _SCALE_FLOOR = 2.0**-10, 127 * 2.0**-24
# Entries that llama.cpp's quantizer sets itself.
_OF_THE_QUANTIZER = ("general.file_type", "general.quantization_version")


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write."""

    name: str
    source: str  # name of the source tensor, for errors
    shape: tuple[int, ...]
    kind: NumberType
    rows: Callable[[int, int], Tensor]  # returns rows [start, stop) of the source

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows of at most 16 MiB in fp32."""
        step = max(1, _CHUNK_VALUES // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.kind.row_bytes(self.shape[-1]))

    def encoded(self) -> np.ndarray:
        """Return the tensor's bytes in the file."""
        data = np.empty(self.byte_shape, np.uint8)
        width = self.kind.row_bytes(1) if len(self.shape) == 1 else 1
        for start, stop in self.chunks():
            data[start * width : stop * width] = encode(self.rows(start, stop), self.kind, self.source)
        return data


def model_name(request: ExportRequest) -> str:
    """Return the output folder's name, in characters that file names and Ollama accept."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", request.final_folder.name).strip(".-") or "model"


def start_writer(request: ExportRequest, form: str, architecture: str) -> Any:
    """Return a `gguf.GGUFWriter` with the general entries; form: `model` or `adapter`."""
    gguf = gguf_package()
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(form)
    writer.add_name(model_name(request))
    kind = request.kind.upper()
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def write_file(request: ExportRequest, writer: Any, tensors: list[PlannedTensor]) -> tuple[Path, dict[str, Any]]:
    """Write `NAME-TYPE.gguf`, one encoded tensor in memory at a time, and verify it if `options.verify`.

    Returns:
        The file, and facts for the report.
    """
    path = request.out / f"{model_name(request)}-{request.kind}.gguf"
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
    if request.options.verify:
        check_file(path, entries, tensors)
    return path, describe_file(request, path, [tensor.kind.name for tensor in tensors])


def describe_file(request: ExportRequest, path: Path, types: Sequence[str]) -> dict[str, Any]:
    """Log the size of a file and the types of its tensors; return the facts for the report."""
    size, counted = path.stat().st_size, Counter(types)
    counts = ", ".join(f"{name}={count}" for name, count in counted.items())
    request.log(f"gguf: file={path.name}, size={format_bytes(size)}, tensors: {counts}")
    return {"file": path.name, "bytes": size, "type": request.kind, "tensors": dict(counted)}


def check_file(path: Path, entries: Mapping[str, Any], tensors: Sequence[PlannedTensor]) -> None:
    """Read a file with the gguf package and compare every entry and every value with the source.

    Types without blocks must equal torch's rounding of the source. Types with blocks may differ by half a step; at an
    end of their range by a step.

    Raises:
        IntegrityError: lists everything that differs.
    """
    reader = gguf_package().GGUFReader(path)
    there = {tensor.name: tensor for tensor in reader.tensors}
    problems = []
    for key, value in entries.items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        if found != (float(np.float32(value)) if isinstance(value, float) else value):
            problems.append(f"entry {key} differs")
    problems += [f"tensor {name} is unexpected" for name in sorted(there.keys() - {tensor.name for tensor in tensors})]
    for tensor in tensors:
        if tensor.name not in there:
            problems.append(f"tensor {tensor.name} is missing")
        elif not _holds(found := there[tensor.name], tensor):
            problems.append(f"tensor {tensor.name} is not {tensor.source} in {found.tensor_type.name.lower()}")
    if problems:
        raise IntegrityError(f"{path.name}: was not written correctly: {'; '.join(problems[:10])}; nothing was kept")


def check_rounded(path: Path, plain: Path) -> None:
    """Check a file of llama.cpp's quantizer as `check_file` does; its source is the f32 file `plain`."""
    package = gguf_package()
    source = package.GGUFReader(plain)
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in package.GGUFReader(path).tensors}
    entries = {
        key: field.contents()
        for key, field in source.fields.items()
        if not key.startswith("GGUF.") and key not in _OF_THE_QUANTIZER
    }
    tensors = []
    for tensor in source.tensors:
        shape = tuple(int(size) for size in tensor.shape[::-1])
        # A type that the quantizer does not write differs from f32.
        kind = ROUNDED_BY_LLAMA.get(kinds.get(tensor.name, ""), TYPES["f32"])
        tensors.append(PlannedTensor(tensor.name, tensor.name, shape, kind, partial(_rows, tensor.data)))
    check_file(path, entries, tensors)


def _rows(data: np.ndarray, start: int, stop: int) -> Tensor:
    return torch.from_numpy(np.array(data[start:stop]))


def _holds(found: Any, planned: PlannedTensor) -> bool:
    if found.tensor_type != planned.kind.ggml or tuple(int(size) for size in found.shape[::-1]) != planned.shape:
        return False
    # The reader returns f32 and f16 as such, all other types as bytes.
    data = found.data.reshape(planned.shape[0], -1) if len(planned.shape) > 1 else found.data
    return all(
        _close(decode(data[start:stop].view(np.uint8), planned.kind), planned.rows(start, stop).float(), planned.kind)
        for start, stop in planned.chunks()
    )


def _close(found: Tensor, source: Tensor, kind: NumberType) -> bool:
    found = found.reshape(source.shape)
    if kind.row_error is not None:
        return bool(((found - source).norm(dim=-1) <= source.norm(dim=-1) * kind.row_error + _SCALE_FLOOR).all())
    if kind.block == 1:
        rounded = {"f32": source, "f16": source.half().float(), "bf16": source.bfloat16().float()}[kind.name]
        return torch.equal(found, rounded)
    blocks = source.view(-1, kind.block)
    limit = blocks.abs().amax(dim=1, keepdim=True) * (kind.worst + _SCALE_SHARE) + _SCALE_FLOOR
    return bool(((found.view(-1, kind.block) - blocks).abs() <= limit).all())
