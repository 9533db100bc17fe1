"""One picture, sound or video of a row, measured: where its file is, and how many tokens it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

MediaKind = Literal["image", "audio", "video"]
KINDS: tuple[MediaKind, ...] = get_args(MediaKind)


@dataclass(frozen=True, slots=True)
class Media:
    """A measured file.

    digest: 16 bytes of a SHA-256, of the file's content and of every setting that decides what a tower reads.
    path: absolute, of a file that stays.
    tokens: placeholder tokens, which is the number of embeddings that the tower makes.
    grid: patches along time, height and width; None for sound.
    seconds_per_grid: of a video, between two steps of the grid's time axis; otherwise 0.
    frames: of a sound, columns of its mel spectrogram; otherwise 0.
    """

    kind: MediaKind
    digest: bytes
    path: str
    tokens: int
    grid: tuple[int, int, int] | None = None
    seconds_per_grid: float = 0.0
    frames: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"digest": self.digest.hex(), "grid": self.grid and list(self.grid)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Media:
        """Build a record from the result of `as_dict`."""
        grid = fields["grid"] and tuple(fields["grid"])
        changed: dict[str, Any] = {"digest": bytes.fromhex(fields["digest"]), "grid": grid}
        return cls(**{**fields, **changed})
