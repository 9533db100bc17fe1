"""The header of a safetensors file, read without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from finetune.system.errors import IntegrityError

_LONGEST_HEADER = 100_000_000  # the limit of the safetensors package
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
_BITS |= {name: 8 for name in ("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")}
_BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors of a safetensors file begin, and the header entry of each tensor by name.

    Raises:
        IntegrityError: the file is corrupt or of another format.

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
        end = 8 + length + _data_bytes(entries)
        if end != size:
            raise ValueError(f"the header needs {end:,} bytes, found {size:,}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{file}: not a complete safetensors file ({error})\nhelp: fetch or copy it again"
        ) from error
    return 8 + length, entries


def _data_bytes(entries: dict[str, Any]) -> int:
    """Return the bytes of all tensors. Raises: ValueError if they overlap, leave a gap or do not fit their shapes."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, stop = entry["data_offsets"]
        bits = math.prod(entry["shape"]) * _BITS[entry["dtype"]]
        if begin != end or (stop - begin) * 8 != bits or any(side < 0 for side in entry["shape"]):
            raise ValueError(f"{name}: {entry['dtype']} {entry['shape']} does not fit its bytes {begin:,} to {stop:,}")
        end = stop
    return end
