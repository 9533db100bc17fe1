"""Where the tensors of safetensors files lie, so that each can be read or mapped without the rest of its file."""

from __future__ import annotations

import json
import math
import mmap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.models.digest import identity
from finetune.system.errors import ConfigError, IntegrityError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER = 100_000_000  # as the safetensors package has it
# What the format calls a type; those that are only written come first.
NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}
NAMES |= {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: from byte `offset` of `file` on, row after row."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The tensors of a model's safetensors files, whose headers alone are in memory."""

    def __init__(self, files: Mapping[str, Path]):
        """files: which file holds each tensor, from `source.weight_files`, which has proved that they are whole.

        Raises: ConfigError for a type of number that is none of a 16- to 64-bit float.
        """
        self._identities = {file: identity(file) for file in sorted(set(files.values()))}
        self.tensors = {name: stored for file in self._identities for name, stored in _stored(file)}

    def check_unchanged(self) -> None:
        """Raises: IntegrityError if a file was written to or replaced since its header was read."""
        for file, before in self._identities.items():
            if not file.exists() or identity(file) != before:
                raise IntegrityError(
                    f"{file} changed while its weights were being read: what they say is not one model's; start again, "
                    "and let nothing write to the model's folder meanwhile"
                )


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and its entry of each by name. The file is not mapped.

    Raises: IntegrityError if it is torn or something else.
    Source: the safetensors format, a length in 8 bytes and a JSON object before the tensors' bytes.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size, _LONGEST_HEADER):
                raise ValueError(f"its first 8 bytes promise a header of {length:,} bytes")
            entries: dict[str, Any] = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != size:
            raise ValueError(f"it has {size:,} bytes, its header promises {end:,}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{file} is not a whole safetensors file ({error}); fetch or copy it again") from error
    return 8 + length, entries


def _stored(file: Path) -> list[tuple[str, Stored]]:
    begin, entries = read_header(file)
    if strange := sorted({entry["dtype"] for entry in entries.values()} - _DTYPES.keys()):
        raise ConfigError(f"{file} holds numbers of type {', '.join(strange)}; weights are read from 16-bit or wider")
    return [
        (name, Stored(file, begin + entry["data_offsets"][0], _DTYPES[entry["dtype"]], tuple(entry["shape"])))
        for name, entry in entries.items()
    ]


def read_rows(stored: Stored, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of a stored tensor, in its own type; of a vector, its elements.

    Raises: IntegrityError if the file ends before them.
    """
    out = torch.empty(stop - start, *stored.shape[1:], dtype=stored.dtype)
    row_bytes = stored.nbytes // max(stored.shape[0], 1)
    with stored.file.open("rb", buffering=0) as stream:
        offset = stored.offset + start * row_bytes
        read_exactly(stream, offset, out.view(-1).view(torch.uint8).numpy().data, stored.file)
    return out


def map_tensor(stored: Stored) -> Tensor:
    """A stored tensor, in its own type, whose storage is pages of the file: read when they are touched.

    Not to be written to. The pages leave the process with the last reference to the tensor. As with every mapping, a
    file that is cut short in place meanwhile ends the process where it touches what is no longer there. A tensor that
    begins between two numbers of its type, as few writers have it, is read.
    Raises: IntegrityError if the file ends before the tensor does.
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
    """Fills `view` from byte `offset` of a stream on. Raises: IntegrityError if the file ends too early."""
    stream.seek(offset)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise _ended(file, offset + done)
        done += count


def check_reaches(file: Path, end: int) -> None:
    """Raises: IntegrityError if a file has fewer than `end` bytes."""
    if (size := file.stat().st_size) < end:
        raise _ended(file, size)


def _ended(file: Path, size: int) -> IntegrityError:
    return IntegrityError(
        f"{file} ends at byte {size:,}, before the weights that its header promises; fetch or copy it again, and let "
        "nothing write to it meanwhile"
    )
