"""Safetensors files written one block of rows at a time: a shard is never in memory.

The safetensors package writes from tensors that are all there at once. Its format is a length in 8 bytes, a JSON
header, and the tensors' bytes one after the other; all of the header follows from names, types and shapes.
Source: the format's description in the safetensors package's README.
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

# Bytes of one write: with 8 MB a 2 GB file took 7 s on ext4 where it took 1.6 s with 1 MB (benchmarks/NOTES.md).
_WRITE_BYTES = 1 << 20
_COPY_BYTES = 1 << 26
_ALIGNMENT = 8

# What a tensor is made of: the bytes of a stored one as they are, or blocks of its rows in order.
Content = Stored | Iterable[Tensor]
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Sequence[Planned], limit_bytes: int) -> dict[str, list[Planned]]:
    """Which file each tensor goes into, in the order given; a tensor larger than the limit has a file of its own."""
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
    """One file, which appears under its name when it is whole and on the disk.

    content: what a tensor is made of; blocks must be of its dtype. advance: told of bytes written.
    """
    # Wide numbers first: then each tensor begins at a multiple of its own size, as readers that map a file wish.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb", buffering=0) as stream:
        stream.write(_header(ordered))
        for tensor in ordered:
            written = _write(stream, content(tensor), advance)
            if written != tensor.nbytes:
                raise AssertionError(f"{tensor.name} has {tensor.nbytes:,} bytes, not {written:,}")
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def write_index(folder: Path, shards: dict[str, list[Planned]]) -> None:
    """The index that says which file holds a tensor; a model in one file needs none."""
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
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write(stream: IO[bytes], content: Content, advance: Advance) -> int:
    if isinstance(content, Stored):
        return _copy(stream, content, advance)
    total = 0
    for block in content:
        _write_all(stream, block.contiguous().view(-1).view(torch.uint8).numpy().data)
        total += block.nbytes
        advance(block.nbytes)
    return total


def _copy(stream: IO[bytes], stored: Stored, advance: Advance) -> int:
    """The bytes of a stored tensor, as they are: by the system where it can, which may share them on disk."""
    left = stored.nbytes
    with stored.file.open("rb", buffering=0) as source:
        source.seek(stored.offset)
        while left and (count := _by_system(source, stream, min(left, _COPY_BYTES))):
            left -= count
            advance(count)
        buffer = bytearray(_WRITE_BYTES)
        while left and (count := source.readinto(memoryview(buffer)[:left])):
            _write_all(stream, memoryview(buffer)[:count])
            left -= count
            advance(count)
    return stored.nbytes - left


def _by_system(source: IO[bytes], out: IO[bytes], most_bytes: int) -> int:
    """Bytes copied without passing through this process; 0 where the system or the file system cannot."""
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
