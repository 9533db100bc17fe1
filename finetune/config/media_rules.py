"""Combinations of settings of images, videos and audio."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.problems import Problem
from finetune.config.sections import DataConfig


def pixel_limits(data: DataConfig) -> Iterator[Problem]:
    """Yield a problem where a lower limit is above its upper one."""
    for name, limits in (("image", data.image), ("video", data.video)):
        if limits.min_pixels > limits.max_pixels:
            found = f"is {limits.min_pixels}, above data.{name}.max_pixels={limits.max_pixels}"
            yield Problem(f"data.{name}.min_pixels", f"{found}; lower it, or raise data.{name}.max_pixels")
