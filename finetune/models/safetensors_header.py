"""The header of a safetensors file, read without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from finetune.system.errors import IntegrityError

_LONGEST_HEADER = 100_000_000  # the limit of the safetensors package
_BITS = (
    dict.fromkeys("BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ".split(), 8)
    | dict.fromkeys("I16 U16 F16 BF16".split(), 16)
    | dict.fromkeys("I32 U32 F32".split(), 32)
    | dict.fromkeys("I64 U64 F64 C64".split(), 64)
    | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
)


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors of a safetensors file begin, and the header entry of each tensor by name.

    Raises:
        IntegrityError: the file is corrupt or of another format: each entry must have a dtype, a shape, and the bytes
            that they need; the entries lie one after the other up to the end of the file.

    Source: the safetensors format: 8 bytes of length, a JSON header, the data.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size, _LONGEST_HEADER):
                raise ValueError(f"invalid header length, found {length:,}")
            entries: dict[str, Any] = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        end = 8 + length + _end_of(entries)
        if end != size:
            raise ValueError(f"the header needs {end:,} bytes, found {size:,}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise not_complete(file, error) from error
    return 8 + length, entries


def not_complete(file: Path, reason: object) -> IntegrityError:
    """Return the error for a safetensors file that cannot be read."""
    return IntegrityError(f"{file}: not a complete safetensors file ({reason})\nhelp: fetch or copy it again")


def _end_of(entries: dict[str, Any]) -> int:
    """Return the bytes of all tensors. Raises: ValueError and others if an entry is wrong."""
    done = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        numbers = [begin, end, *entry["shape"]]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"{name}: offsets and sizes must be whole numbers, found {str(numbers)[:80]}")
        bits = math.prod(entry["shape"]) * _BITS[entry["dtype"]]
        if begin != done or 8 * (end - begin) != bits:
            raise ValueError(f"{name}: {entry['dtype']} {entry['shape']} does not fit bytes {begin:,} to {end:,}")
        done = end
    return done
