"""Supported model families: a file each, with everything that differs between them."""

from finetune.models.families.family import SHAPE_KEYS, ModelFamily, Tower
from finetune.models.families.known import FAMILIES, QWEN25_SHAPES, family_of, shape_of, text_settings

__all__ = ["FAMILIES", "QWEN25_SHAPES", "SHAPE_KEYS", "ModelFamily", "Tower", "family_of", "shape_of", "text_settings"]
