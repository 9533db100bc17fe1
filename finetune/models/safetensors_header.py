"""The header of a safetensors file, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.system.errors import IntegrityError

_LONGEST_HEADER = 100_000_000  # the limit of the safetensors package


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
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != size:
            raise ValueError(f"the header needs {end:,} bytes, found {size:,}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{file}: not a complete safetensors file ({error})\nhelp: fetch or copy it again"
        ) from error
    return 8 + length, entries
