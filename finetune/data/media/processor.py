"""Measure the media of rows, and make what the towers of a model read, without torch.

`measure` runs in tokenizing processes: it finds the file, decodes it once to know that it can be read, and counts its
tokens. `pixels` and `mel` run where features are computed, in any process of the same machine.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config.schema import DataConfig
from finetune.data.media.audio import AudioSettings, read_audio
from finetune.data.media.files import Finder, digest_of, opened, shown
from finetune.data.media.images import read_image, resized
from finetune.data.media.media import KINDS, Media, MediaKind
from finetune.data.media.patches import PatchSettings
from finetune.data.media.settings import audio_settings, image_settings, position_rule, video_settings
from finetune.data.media.video import FrameSampling, VideoFacts, most_pixels, read_frames, video_facts
from finetune.models.families import ModelFamily, PositionRule
from finetune.system.errors import DataError

# Raise it when the same file and settings give other values.
MEDIA_VERSION = 1


@dataclass(frozen=True, slots=True)
class MediaProcessor:
    """Reads media for one model; picklable, equal settings give equal values.

    title: of the model's family. kinds: that its towers read.
    placeholders: by kind, the token that stands for one embedding. positions: of the model's tokens.
    """

    title: str
    kinds: tuple[MediaKind, ...]
    placeholders: Mapping[str, str]
    positions: PositionRule
    image: PatchSettings
    video: PatchSettings
    sampling: FrameSampling
    audio: AudioSettings
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
                if kind == "audio":
                    frames = self.audio.frames(len(read_audio(file, self.audio)))
                    return Media(kind, digest, path, self.audio.tokens(frames), frames=frames)
                if kind == "image":
                    grid = self.image.grid(1, *read_image(file).shape[:2])
                    return Media(kind, digest, path, self.image.tokens(grid), grid)
                return self._measured_video(digest, path, video_facts(file))
        except DataError as error:
            raise DataError(f"{kind} {shown(reference)} {error}") from error

    def pixels(self, media: Media) -> np.ndarray:
        """Return the patches of an image or a video.

        Returns: [grid.prod(), 3 * temporal_patch_size * patch_size**2] float32, equal to `pixel_values` of
        transformers' Qwen2VLImageProcessorPil; frames of videos are resized in the same way.
        Raises: DataError if the file cannot be read, or changed since it was measured.
        """
        with self._unchanged(media) as file:
            if media.kind == "image":
                frame = read_image(file)
                return self.image.patches(resized(frame, *self.image.resized(*frame.shape[:2]))[None])
            facts = video_facts(file)
            file.seek(0)
            indices, settings = self._frames(facts)
            return settings.patches(read_frames(file, indices, *settings.resized(facts.height, facts.width)))

    def mel(self, media: Media) -> np.ndarray:
        """Return the log-mel spectrogram of audio.

        Returns: [mel bins, media.frames] float32, equal to `input_features` of transformers' WhisperFeatureExtractor
        (its numpy path).
        Raises: DataError if the file cannot be read, or changed since it was measured.
        """
        with self._unchanged(media) as file:
            return self.audio.log_mel(read_audio(file, self.audio))

    def _frames(self, facts: VideoFacts) -> tuple[np.ndarray, PatchSettings]:
        """Return the numbers of the frames to read, and how they become patches."""
        multiple = self.video.temporal_patch_size
        indices = self.sampling.indices(facts, multiple)
        side = self.video.patch_size * self.video.merge_size
        limit = most_pixels(self.video.max_pixels, self.video.min_pixels, len(indices), side)
        return indices, replace(self.video, max_pixels=limit)

    def _measured_video(self, digest: bytes, path: str, facts: VideoFacts) -> Media:
        indices, settings = self._frames(facts)
        grid = settings.grid(len(indices), facts.height, facts.width)
        seconds = self.sampling.seconds_per_grid(facts, len(indices), settings.temporal_patch_size)
        return Media("video", digest, path, settings.tokens(grid), grid, seconds)

    def settings(self) -> dict[str, Any]:
        """Return everything that decides what `measure` returns for a file, as JSON values."""
        return {"version": MEDIA_VERSION, **asdict(self)}

    def _digest(self, kind: MediaKind, content: bytes) -> bytes:
        deciding = {
            "image": (self.image,),
            "video": (self.video, self.sampling),
            "audio": (replace(self.audio, max_seconds=0),),
        }[kind]
        settings = json.dumps([MEDIA_VERSION, kind, *map(asdict, deciding)], sort_keys=True)
        return hashlib.sha256(settings.encode() + content).digest()[:16]

    @contextmanager
    def _unchanged(self, media: Media) -> Iterator[io.FileIO]:
        """Open the file of a record, if its content and these settings give the record's digest."""
        try:
            with opened(media.path, media.kind) as file:
                if self._digest(media.kind, digest_of(file)) != media.digest:
                    raise DataError("changed since its row was tokenized; start the run again")
                yield file
        except DataError as error:
            raise DataError(f"{media.kind} {shown(media.path)} {error}") from error


def build_media_processor(family: ModelFamily, folder: Path | None, cfg: DataConfig) -> MediaProcessor:
    """Build the processor of a model.

    Args:
        family: its record.
        folder: of the checkpoint, where preprocessor_config.json has the sizes of patches; None: the family's.
        cfg: with the limits of images, videos and audio.

    Raises:
        ConfigError: the checkpoint's settings are damaged or not supported.
    """
    kinds = {kind for tower in family.towers.values() for kind in tower.placeholders}
    return MediaProcessor(
        title=family.title,
        kinds=tuple(kind for kind in KINDS if kind in kinds),
        placeholders=family.placeholders,
        positions=position_rule(family, folder),
        image=image_settings(folder, cfg),
        video=video_settings(folder, cfg),
        sampling=FrameSampling(cfg.video.fps, cfg.video.max_frames),
        audio=audio_settings(folder, cfg),
        finder=Finder(cfg.allow_urls),
    )
