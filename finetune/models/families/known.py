"""Find the record of a model, and its shape, from a config.json or a hub id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.models.families import llama, mistral, qwen2, qwen2_5_omni, qwen2_5_vl, qwen3
from finetune.models.families.family import SHAPE_KEYS, ModelFamily
from finetune.system.errors import ConfigError

_RECORDS = (qwen2.FAMILY, qwen3.FAMILY, llama.FAMILY, mistral.FAMILY, qwen2_5_vl.FAMILY, *qwen2_5_omni.FAMILIES)
# By model_type in config.json.
FAMILIES = {family.model_type: family for family in _RECORDS}
# Of transformers, where config.json has no such key.
_DEFAULT_WINDOW, _DEFAULT_FULL_LAYERS = 4096, 28
QWEN25 = qwen2.FAMILY
QWEN25_SHAPES = QWEN25.shapes()


def family_of(model_type: object, where: str) -> ModelFamily:
    """Return the record of a model type. Raises: ConfigError, prefixed with `where`, if it is not supported."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"{where}: unsupported model family, found {model_type!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a decoder from a whole config.json, with the model type of the whole."""
    settings = dict(config)
    family = FAMILIES.get(str(config.get("model_type")))
    for key in (*family.loaded_settings, *family.decoder_settings) if family else ():
        inner = settings.get(key)
        if isinstance(inner, dict):  # older files hold the decoder's settings at the top
            # A tied head is a setting of the model around the decoder, and false by default.
            tied = settings.get("tie_word_embeddings", inner.get("tie_word_embeddings", False))
            settings = {**settings, **inner, "tie_word_embeddings": tied}
    return settings | {key: config[key] for key in ("model_type",) if key in config}


def attention_window(settings: Mapping[str, Any]) -> int | None:
    """Return how many tokens attention reaches back, from a decoder's settings in config.json; None: no limit."""
    kind = FAMILIES[settings["model_type"]].window
    if kind == "never" or (kind == "if use_sliding_window" and not settings.get("use_sliding_window")):
        return None
    window, layers = settings.get("sliding_window", _DEFAULT_WINDOW), settings.get("layer_types")
    if kind == "if use_sliding_window":
        first, count = settings.get("max_window_layers", _DEFAULT_FULL_LAYERS), settings["num_hidden_layers"]
        slides = first < count if layers is None else "sliding_attention" in layers
        return window if slides else None
    return window


def shape_of(model_name: str) -> dict[str, Any] | None:
    """Return the shape of a model without loading it: the keys of SHAPE_KEYS, model_type, and `towers` if it has any.

    A local folder has a config.json; a hub id of a supported family contains the size. None if the file is invalid or
    incomplete, or the hub id is unknown.
    """
    config_file = Path(model_name).expanduser() / "config.json"
    if config_file.is_file():
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None  # load_base reports the error
        if not isinstance(config, dict):
            return None
        config = text_settings(config)
        return complete_shape(config)
    return next(filter(None, (family.shape_of_hub_id(model_name) for family in _RECORDS)), None)


def complete_shape(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the shape in the settings that `text_settings` returns; None if a key is missing."""
    known = {key: config[key] for key in ("model_type", *SHAPE_KEYS) if config.get(key) is not None}
    if "head_dim" not in known:
        hidden, heads = (known.get(key) for key in ("hidden_size", "num_attention_heads"))
        # An invalid number of heads is reported by its own key.
        known["head_dim"] = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 1
    if len(known) < len(SHAPE_KEYS) + 1:
        return None
    family = FAMILIES.get(str(known["model_type"]))
    return known | (family.tower_shapes(known["hidden_size"], config=config) if family else {})
