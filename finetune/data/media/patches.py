"""From frames to the patches that a vision tower reads, as the processors of Qwen2-VL make them, in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.system.errors import DataError

# Longer over shorter side; the official processors refuse more.
MOST_ELONGATED = 200


@dataclass(frozen=True, slots=True)
class PatchSettings:
    """How frames become patches: keys of preprocessor_config.json, and limits of the run's config.

    merge_size: patches along height and along width that share one token.
    temporal_patch_size: frames that share one patch.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the number of patches along time, height and width for frames of this size. Raises: DataError."""
        height, width = self.resized(height, width)
        return -(-frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def tokens(self, grid: Sequence[int]) -> int:
        """Return the number of tokens of a grid."""
        return math.prod(grid) // self.merge_size**2

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to resize to: whole tokens, within the limits of pixels, the proportions nearly kept.

        Raises: DataError if one side is more than 200 times the other.
        Source: `smart_resize` of Qwen2-VL.
        """
        if max(height, width) > MOST_ELONGATED * min(height, width):
            raise DataError(
                f"has {width} x {height} pixels; the model reads no image with a side over {MOST_ELONGATED} times "
                "the other: cut it into parts"
            )
        side = self.patch_size * self.merge_size
        nearest = round(height / side) * side, round(width / side) * side
        if math.prod(nearest) > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            return (
                max(side, math.floor(height / scale / side) * side),
                max(side, math.floor(width / scale / side) * side),
            )
        if math.prod(nearest) < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * scale / side) * side, math.ceil(width * scale / side) * side
        return nearest

    def patches(self, frames: np.ndarray) -> np.ndarray:
        """Return the patches of resized frames.

        Args:
            frames: [T, H, W, 3] uint8; the last one is repeated to fill the last patch.

        Returns:
            [grid.prod(), 3 * temporal_patch_size * patch_size**2] float32; the patches of a token are neighbors.
        """
        side, merge, time = self.patch_size, self.merge_size, self.temporal_patch_size
        if missing := -len(frames) % time:
            frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
        count, height, width, channels = frames.shape
        parts = frames.reshape(
            count // time, time, height // (side * merge), merge, side, width // (side * merge), merge, side, channels
        ).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        flat = parts.reshape(-1, channels, time * side * side)
        # A byte has one of 256 values: the processors' arithmetic once per value and channel, with their rounding.
        values = (np.arange(256) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(each, np.float32)[:, None] for each in (self.image_mean, self.image_std))
        table = (values - mean) / std
        return table[np.arange(channels)[:, None], flat].reshape(len(flat), -1)
