"""Adapters in messages: which tensors travel, and folders to and from them, with the standard library alone.

The environment of Flower has neither torch nor this project. A safetensors file is the length of a JSON header, the
header and the bytes of the tensors (https://huggingface.co/docs/safetensors); nothing is computed with them here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TENSOR_FILE = "adapter_model.safetensors"
# The settings of the adapter, and what `finetune clip` and `finetune aggregate` record of its base.
TEXT_FILES = ("adapter_config.json", "federation.json")
_BASE_NAME = "base_model_name_or_path"


@dataclass(frozen=True)
class Tensor:
    """dtype: safetensors' name of it, as F32. data: values in row-major order, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder in memory. texts: content of its JSON files by name."""

    tensors: Tensors
    texts: Mapping[str, str]


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder; of a path to the base only the last part, since a party's paths stay with it."""
    content = (folder / TENSOR_FILE).read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    values = memoryview(content)[8 + length :]
    tensors = {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), bytes(values[slice(*entry["data_offsets"])]))
        for name, entry in header.items()
    }
    files = [folder / name for name in TEXT_FILES if (folder / name).is_file()]
    return Adapter(tensors, {file.name: _without_paths(file.read_text(encoding="utf-8")) for file in files})


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter into a new folder."""
    named = sorted(adapter.tensors.items())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in named:
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the values, as safetensors does
    folder.mkdir(parents=True)
    (folder / TENSOR_FILE).write_bytes(
        b"".join([struct.pack("<Q", len(text)), text, *(tensor.data for _, tensor in named)])
    )
    for name in TEXT_FILES:
        if name in adapter.texts:
            (folder / name).write_text(adapter.texts[name], encoding="utf-8")


def without_a(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors that training changes while A is frozen."""
    return {name: tensor for name, tensor in tensors.items() if ".lora_A." not in name}


def completed(tensors: Tensors, known: Tensors) -> dict[str, Tensor]:
    """Return received tensors, with the A of an adapter that the receiver has where they come without."""
    return {name: tensor for name, tensor in known.items() if ".lora_A." in name} | dict(tensors)


def count_bytes(tensors: Tensors) -> int:
    """Return the bytes of the values."""
    return sum(len(tensor.data) for tensor in tensors.values())


def _without_paths(text: str) -> str:
    content = json.loads(text)
    for owner, key in ((content, _BASE_NAME), (content.get("base") or {}, "name")):
        if Path(str(owner.get(key))).is_absolute():
            owner[key] = Path(owner[key]).name
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
