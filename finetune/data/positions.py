"""Media among the tokens of a row, and the positions of all tokens on the axes time, height and width."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isqrt, prod
from typing import Any

import numpy as np

from finetune.data.media.media import Media
from finetune.models.families.family import PositionRule

AXES = 3  # time, height, width


@dataclass(frozen=True, slots=True)
class PlacedMedia:
    """The media of a row, in the order of its tokens.

    starts: the first token of each; its embeddings take `Media.tokens` tokens from there on.
    """

    items: tuple[Media, ...]
    starts: tuple[int, ...]
    rule: PositionRule

    @property
    def digest(self) -> bytes:
        """Return a hash of all media [16 bytes]."""
        return hashlib.blake2b(b"".join(item.digest for item in self.items), digest_size=16).digest()

    def tokens(self) -> np.ndarray:
        """Return the tokens [M] int64 that hold embeddings of media."""
        return np.concatenate(
            [np.arange(start, start + item.tokens) for item, start in zip(self.items, self.starts, strict=True)]
        )

    def within(self, start: int, stop: int) -> PlacedMedia | None:
        """Return the media of the tokens [start, stop), numbered from `start`; None without any.

        Raises: ValueError if that cuts through the tokens of a medium.
        """
        kept = []
        for item, first in zip(self.items, self.starts, strict=True):
            inside = min(stop, first + item.tokens) - max(start, first)
            if 0 < inside < item.tokens:
                raise ValueError(f"tokens [{start}, {stop}) cut the {item.kind} at [{first}, {first + item.tokens})")
            kept += [(item, first - start)] if inside > 0 else []
        return PlacedMedia(*map(tuple, zip(*kept, strict=True)), self.rule) if kept else None  # type: ignore[arg-type]

    def joined(self, other: PlacedMedia, tokens: int) -> PlacedMedia:
        """Return these media, and those of another row laid after the first `tokens` tokens."""
        starts = tuple(start + tokens for start in other.starts)
        return PlacedMedia(self.items + other.items, self.starts + starts, self.rule)

    def positions(self, length: int) -> np.ndarray:
        """Return the positions [3, T] int64 of the row's T tokens: time, height and width."""
        parts, position, token = [], 0, 0
        for item, start in zip(self.items, self.starts, strict=True):
            before, inside = start - token, _inside(item, self.rule.steps_per_second)
            parts += [_text(position, before), inside + position + before]
            counted = inside if self.rule.text_follows_time else inside[1:]
            position += before + int(counted.max()) + 1
            token = start + item.tokens
        parts.append(_text(position, length - token))
        return np.concatenate(parts, axis=1)

    def as_dict(self) -> dict[str, Any]:
        """Return them as JSON; `from_dict` reads it."""
        return {"media": [m.as_dict() for m in self.items], "starts": [*self.starts], "rule": asdict(self.rule)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlacedMedia:
        items = tuple(Media.from_dict(item) for item in values["media"])
        return cls(items, tuple(values["starts"]), PositionRule(**values["rule"]))


def _text(first: int, tokens: int) -> np.ndarray:
    return np.broadcast_to(np.arange(first, first + tokens), (AXES, tokens))


def _inside(item: Media, steps_per_second: float) -> np.ndarray:
    """Return the positions [3, tokens] of one medium, from 0. Source: get_rope_index of transformers."""
    if item.grid is None:
        return _text(0, item.tokens)
    merge = isqrt(prod(item.grid) // item.tokens)  # patches per token, in each direction
    times, rows, columns = item.grid[0], item.grid[1] // merge, item.grid[2] // merge
    # In 32 bits and in this order: the fraction is cut off, so a rounding error would be a whole step.
    seconds = np.arange(times, dtype=np.float32) * np.float32(item.seconds_per_grid)
    time = (seconds * np.float32(steps_per_second)).astype(np.int64)
    axes = np.meshgrid(time, np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack(axes).reshape(AXES, -1)
