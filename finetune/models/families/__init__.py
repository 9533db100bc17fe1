"""Supported model families: a file each, with everything that differs between them."""

from __future__ import annotations

from finetune.models.families.family import SHAPE_KEYS, Gguf, ModelFamily, PositionRule, Tower
from finetune.models.families.known import (
    FAMILIES,
    QWEN25,
    QWEN25_SHAPES,
    attention_window,
    family_of,
    shape_of,
    text_settings,
)

__all__ = [
    "FAMILIES",
    "QWEN25",
    "QWEN25_SHAPES",
    "SHAPE_KEYS",
    "Gguf",
    "ModelFamily",
    "PositionRule",
    "Tower",
    "attention_window",
    "family_of",
    "shape_of",
    "text_settings",
]
