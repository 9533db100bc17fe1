"""What the media of a run's rows demand of each tower: measured, or the most that the config allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from finetune.config.schema import DataConfig, LoraConfig
from finetune.data.media.media import Media
from finetune.planning.tower_shapes import UNITS_PER_TOKEN, TowerShape


@dataclass(frozen=True, slots=True)
class MediaLoad:
    """What one tower reads.

    largest: units of the largest file. reach: positions that full attention reaches, on average.
    mean_share, most_share: of the tokens of rows, of all of them together and in the row with the most.
    row_tokens: tokens of a row; None if unknown. tokens: of distinct files; None if unknown.
    """

    largest: int
    reach: float
    mean_share: float
    most_share: float
    row_tokens: float | None = None
    tokens: int | None = None

    def share(self, tokens: int) -> float:
        """Return the share of so many tokens of packed rows.

        The mean of n rows is nearer to that of all than a single row: its spread is 1 / sqrt(n) of a row's.
        """
        rows = 1.0 if self.row_tokens is None else max(1.0, tokens / self.row_tokens)
        return self.mean_share + (self.most_share - self.mean_share) / math.sqrt(rows)


def most_tokens(towers: Iterable[str], data: DataConfig) -> dict[str, int]:
    """Return the tokens of the largest file of each kind that the limits and `data.max_length` allow."""
    found: dict[str, int] = {}
    # These modules import numpy, which takes longer than the plan of a text model.
    if "vision" in towers:
        from finetune.data.media.patches import PatchSettings
        from finetune.data.media.video import most_pixels

        side = PatchSettings(1, 1)
        pixels_of_token = (side.patch_size * side.merge_size) ** 2
        frames = data.video.max_frames
        of_frame = most_pixels(data.video.max_pixels, data.video.min_pixels, frames, side.patch_size * side.merge_size)
        found["image"] = data.image.max_pixels // pixels_of_token
        found["video"] = -(-frames // side.temporal_patch_size) * (of_frame // pixels_of_token)
    if "audio" in towers:
        from finetune.data.media.audio import AudioSettings

        audio = AudioSettings(data.audio.max_seconds)
        found["audio"] = audio.tokens(audio.frames(round(data.audio.max_seconds * audio.sampling_rate)))
    return {kind: min(tokens, data.max_length) for kind, tokens in found.items()}


def largest_media(
    towers: Mapping[str, TowerShape], data: DataConfig, lora: LoraConfig, share: float
) -> dict[str, MediaLoad]:
    """Return the load of unknown rows: each file is the largest of `most_tokens`.

    share: of media in the tokens. All of them are images, or sound if only the audio tower is trained.
    """
    tokens, found = most_tokens(towers, data), {}
    shared = next((name for name in towers if name in lora.towers), next(iter(towers), None))
    for name in towers:
        kinds = ("audio",) if name == "audio" else ("image", "video")
        largest, reach = UNITS_PER_TOKEN * max(tokens[kind] for kind in kinds), UNITS_PER_TOKEN * tokens[kinds[0]]
        here = share if name == shared else 0.0
        found[name] = MediaLoad(largest, reach, here, here)
    return found


def measured_media(
    towers: Mapping[str, TowerShape], rows: Iterable[tuple[int, Sequence[Media]]], held_out: Iterable[Media]
) -> dict[str, MediaLoad]:
    """Return the load of known rows.

    Args:
        rows: of training, each with its tokens and its media.
        held_out: the media of other rows, which towers read too.
    """
    total, count = 0, 0
    files: dict[str, dict[bytes, Media]] = {name: {} for name in towers}
    shares: dict[str, tuple[int, float]] = dict.fromkeys(towers, (0, 0.0))
    for length, media in rows:
        total, count = total + length, count + 1
        of_row = dict.fromkeys(towers, 0)
        for each in media:
            files[_tower_of(each)][each.digest] = each
            of_row[_tower_of(each)] += each.tokens
        for name, tokens in of_row.items():
            shares[name] = shares[name][0] + tokens, max(shares[name][1], tokens / length)
    for each in held_out:
        files[_tower_of(each)][each.digest] = each
    return {
        name: MediaLoad(
            largest=max(map(units_of, files[name].values()), default=0),
            reach=_mean_reach(files[name].values(), tower),
            mean_share=shares[name][0] / max(1, total),
            most_share=shares[name][1],
            row_tokens=total / max(1, count),
            tokens=sum(each.tokens for each in files[name].values()),
        )
        for name, tower in towers.items()
    }


def units_of(media: Media) -> int:
    """Return the patches or columns of a file."""
    return media.frames if media.grid is None else math.prod(media.grid)


def _tower_of(media: Media) -> str:
    return "audio" if media.kind == "audio" else "vision"


def _mean_reach(media: Iterable[Media], tower: TowerShape) -> float:
    """Return the patches of a frame, averaged over all patches; of sound, the window."""
    pairs, patches = 0.0, 0
    for each in media:
        if each.grid is not None:
            time, height, width = each.grid
            pairs, patches = pairs + time * (height * width) ** 2, patches + math.prod(each.grid)
    return pairs / patches if patches else float(tower.window)
