"""Supported model families, and the shapes of the seven Qwen2.5 sizes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.system.errors import ConfigError


@dataclass(frozen=True)
class ModelFamily:
    """One supported architecture. To add a family, add a record here and a tiny random model to the tests."""

    linear_modules: tuple[str, ...]  # linear layers of a block: the targets of `lora.target_modules=all-linear`
    head: str = "lm_head"  # full name of the output layer, which is never quantized
    end_of_turn: str = "<|im_end|>"


# By model_type in config.json.
FAMILIES = {"qwen2": ModelFamily(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))}


def family_of(model_type: object, where: str) -> ModelFamily:
    """Return the record of a model type. Raises: ConfigError, prefixed with `where`, if it is not supported."""
    if model_type not in FAMILIES:
        raise ConfigError(f"{where}: unsupported model family, found {model_type!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[str(model_type)]


# Keys of config.json; head_dim is hidden_size // num_attention_heads where the file has none.
SHAPE_KEYS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "vocab_size tie_word_embeddings head_dim"
).split()
# From the config.json of Qwen/Qwen2.5-<size>. Instruct, Coder and Math variants of a size have the same shapes.
_ROWS = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True, 64),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True, 128),
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 128),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 128),
    "14B": (5120, 13824, 48, 40, 8, 152064, False, 128),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 128),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 128),
}
QWEN25_SHAPES: dict[str, dict[str, Any]] = {
    size: {"model_type": "qwen2", **dict(zip(SHAPE_KEYS, row, strict=True))} for size, row in _ROWS.items()
}

_HUB_NAME = re.compile(r"(?:.*/)?Qwen2\.5(?:-Coder|-Math)?-(?P<size>[\d.]+B)(?:-.*)?", re.IGNORECASE)


def shape_of(model_name: str) -> dict[str, Any] | None:
    """Return the shape of a model without loading it: the keys of SHAPE_KEYS and model_type.

    A local folder has a config.json; a hub id of a Qwen2.5 model contains the size. None if the file is invalid or
    incomplete, or the hub id is unknown.
    """
    config_file = Path(model_name).expanduser() / "config.json"
    if config_file.is_file():
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError:
            return None  # load_base reports the error
        known = {key: config[key] for key in ("model_type", *SHAPE_KEYS) if config.get(key) is not None}
        if "head_dim" not in known:
            hidden, heads = (known.get(key) for key in ("hidden_size", "num_attention_heads"))
            # An invalid number of heads is reported by its own key.
            known["head_dim"] = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 1
        return known if len(known) == len(SHAPE_KEYS) + 1 else None
    match = _HUB_NAME.fullmatch(model_name)
    return QWEN25_SHAPES.get(match["size"].upper()) if match else None
