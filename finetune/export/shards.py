"""Write safetensors files one block of rows at a time, so a shard is never in memory as a whole.

The safetensors package needs all tensors in memory. Its format is a length in 8 bytes, a JSON header, and the bytes of
the tensors; names, dtypes and shapes decide the whole header.
Source: README of the safetensors package.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from finetune.models.hub import INDEX_FILE, SINGLE_FILE
from finetune.models.safetensors_index import NAMES, Stored
from finetune.system.atomic import replaced_file

# Bytes of one write: a 2 GB file took 7 s on ext4 with 8 MB, and 1.6 s with 1 MB (benchmarks/NOTES.md).
_WRITE_BYTES = 1 << 20
_COPY_BYTES = 1 << 26
_ALIGNMENT = 8

# The content of a tensor: the bytes of a stored one, or blocks of its rows in order.
Content = Stored | Iterable[Tensor]
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Sequence[Planned], limit_bytes: int) -> dict[str, list[Planned]]:
    """Return the tensors of each file, in the given order; a tensor above the limit gets a file of its own."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": part for i, part in enumerate(shards, 1)}


def write_shard(
    file: Path, tensors: Sequence[Planned], content: Callable[[Planned], Content], advance: Advance
) -> None:
    """Write one file, which gets its name when it is complete and on the disk; `advance` gets bytes written."""
    # Wide dtypes first: each tensor then starts at a multiple of its item size, as memory-mapped readers expect.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    with replaced_file(file, buffering=0) as stream:
        stream.write(_header(ordered))
        for tensor in ordered:
            found, written = content(tensor), 0
            if isinstance(found, Stored):
                written = _copy(stream, found, advance)
            else:
                for block in found:
                    _write_all(stream, block.contiguous().view(-1).view(torch.uint8).numpy().data)
                    written += block.nbytes
                    advance(block.nbytes)
            if written != tensor.nbytes:
                raise AssertionError(f"{tensor.name} has {tensor.nbytes:,} bytes, not {written:,}")


def write_index(folder: Path, shards: dict[str, list[Planned]]) -> None:
    """Write the index of a model in several files."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for part in shards.values() for tensor in part)},
        "weight_map": {tensor.name: file for file, part in shards.items() for tensor in part},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(tensors: Sequence[Planned]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _copy(stream: IO[bytes], stored: Stored, advance: Advance) -> int:
    """Copy the bytes of a stored tensor, by the system if it can, which may share them on disk."""
    left = stored.nbytes
    with stored.file.open("rb", buffering=0) as source:
        source.seek(stored.offset)
        while left and (count := _copy_range(source, stream, min(left, _COPY_BYTES))):
            left -= count
            advance(count)
        buffer = bytearray(_WRITE_BYTES)
        while left and (count := source.readinto(memoryview(buffer)[:left])):
            _write_all(stream, memoryview(buffer)[:count])
            left -= count
            advance(count)
    return stored.nbytes - left


def _copy_range(source: IO[bytes], out: IO[bytes], most_bytes: int) -> int:
    """Return the bytes that the system copied without this process; 0 if it cannot."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source.fileno(), out.fileno(), most_bytes)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def _write_all(stream: IO[bytes], view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += stream.write(view[done : done + _WRITE_BYTES])
