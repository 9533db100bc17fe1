"""Tokens of one row, and the label of a position that is not trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from finetune.data.media.media import Media
    from finetune.data.positions import PlacedMedia

# torch.nn.functional.cross_entropy's default `ignore_index`.
IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to continue. ids [T] int32. placed: their images, audio and video."""

    ids: np.ndarray
    placed: PlacedMedia | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of one row.

    ids [T] int32. weights [T] float32: a token's loss weight as a target, 0 where untrained.
    placed: its images, audio and video; None for text.
    chosen_tokens: of a row with preferences: its first tokens are a desirable answer with its prompt, the others an
        undesirable one with its prompt; either may be empty. None for rows without preferences.
    """

    ids: np.ndarray
    weights: np.ndarray
    placed: PlacedMedia | None = None
    chosen_tokens: int | None = None

    @property
    def media(self) -> tuple[Media, ...]:
        """Its images, audio and video, in the order of the tokens."""
        return () if self.placed is None else self.placed.items

    @property
    def media_digest(self) -> bytes:
        """Hash of the row's images, audio and video; empty for text."""
        return b"" if self.placed is None else self.placed.digest

    @property
    def trained(self) -> np.ndarray:
        """Which tokens are targets [T] bool."""
        return self.weights > 0

    @property
    def sides(self) -> tuple[slice, slice]:
        """The tokens of the desirable and of the undesirable answer, each with its prompt; one may be empty."""
        if self.chosen_tokens is None:
            raise ValueError("the row has no preference")
        return slice(0, self.chosen_tokens), slice(self.chosen_tokens, len(self.ids))

    @property
    def targets(self) -> int:
        """The number of targets. The first token is not predicted, so it is never one."""
        return int(self.trained[1:].sum())
