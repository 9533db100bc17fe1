"""Safetensors files: write them, and find the position of each tensor, so that it can be read or mapped alone."""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.models.digest import identity
from finetune.models.safetensors_header import not_complete, read_header
from finetune.system.errors import ConfigError, IntegrityError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Names of dtypes in the format. The first ones are written only.
NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}
NAMES |= {dtype: name for name, dtype in _DTYPES.items()}


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file that others may read as the umask says; the library alone makes it readable by its owner only."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata=metadata)
    file.chmod(mode)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a file, mapped. Raises: IntegrityError if it is corrupt."""
    read_header(file)
    try:
        return load_file(file)
    except SafetensorError as error:  # what its reader of JSON refuses, and Python's does not
        raise not_complete(file, error) from error


@dataclass(frozen=True, slots=True)
class Stored:
    """The position of a tensor: from byte `offset` of `file` on, in row-major order."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The tensors of a model's safetensors files. Only the headers are in memory."""

    def __init__(self, files: Mapping[str, Path]):
        """Read the headers.

        files: the file of each tensor, from `hub.weight_files`, which has checked that the files are complete.
        Raises: ConfigError for a dtype other than a 16-bit to 64-bit float.
        """
        self._identities = {file: identity(file) for file in sorted(set(files.values()))}
        self.tensors = {name: stored for file in self._identities for name, stored in _stored(file)}

    def check_unchanged(self) -> None:
        """Raise IntegrityError if a file changed since its header was read."""
        for file, before in self._identities.items():
            if not file.exists() or identity(file) != before:
                raise IntegrityError(
                    f"{file}: changed while its weights were read\nhelp: start again, and let no process write to the "
                    "model folder meanwhile"
                )


def _stored(file: Path) -> list[tuple[str, Stored]]:
    begin, entries = read_header(file)
    if strange := sorted({entry["dtype"] for entry in entries.values()} - _DTYPES.keys()):
        raise ConfigError(f"{file}: weights must be 16-bit floats or wider, found {', '.join(strange)}")
    if scalars := [name for name, entry in entries.items() if not entry["shape"]]:
        raise ConfigError(f"{file}: weights must have a dimension, found the single numbers {', '.join(scalars[:5])}")
    return [
        (name, Stored(file, begin + entry["data_offsets"][0], _DTYPES[entry["dtype"]], tuple(entry["shape"])))
        for name, entry in entries.items()
    ]


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file onto the CPU. Raises: IntegrityError if the file is corrupt."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)
    except SafetensorError as error:
        raise not_complete(file, error) from error


def read_rows(stored: Stored, start: int, stop: int) -> Tensor:
    """Read rows `start` to `stop` of a tensor in its own dtype; of a vector, its elements.

    Raises: IntegrityError if the file ends too early.
    """
    out = torch.empty(stop - start, *stored.shape[1:], dtype=stored.dtype)
    row_bytes = stored.nbytes // max(stored.shape[0], 1)
    with stored.file.open("rb", buffering=0) as stream:
        offset = stored.offset + start * row_bytes
        read_exactly(stream, offset, out.view(-1).view(torch.uint8).numpy().data, stored.file)
    return out


def map_tensor(stored: Stored) -> Tensor:
    """Map a tensor of a file into memory, in its own dtype: pages are read when touched. Do not write to it.

    The pages are freed with the last reference. As with every mapping, a process that touches pages of a file truncated
    meanwhile is killed. A tensor that is not aligned to its dtype is read instead.
    Raises: IntegrityError if the file ends too early.
    """
    if stored.offset % stored.dtype.itemsize or not stored.nbytes:
        return read_rows(stored, 0, stored.shape[0])
    skipped = stored.offset % mmap.ALLOCATIONGRANULARITY
    check_reaches(stored.file, stored.offset + stored.nbytes)
    with stored.file.open("rb") as stream:
        length, start = skipped + stored.nbytes, stored.offset - skipped
        pages = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=start)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(pages, dtype=stored.dtype, count=math.prod(stored.shape), offset=skipped)
    return flat.view(stored.shape)


def read_exactly(stream: Any, offset: int, view: memoryview, file: Path) -> None:
    """Fill `view` from byte `offset` of a stream on. Raises: IntegrityError if the file ends too early."""
    stream.seek(offset)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise _ended(file, offset + done)
        done += count


def check_reaches(file: Path, end: int) -> None:
    """Raise IntegrityError if a file has fewer than `end` bytes."""
    if (size := file.stat().st_size) < end:
        raise _ended(file, size)


def _ended(file: Path, size: int) -> IntegrityError:
    return IntegrityError(
        f"{file}: too short for its header, found {size:,} bytes\nhelp: fetch or copy it again, and let no process "
        "write to it meanwhile"
    )
