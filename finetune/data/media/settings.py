"""The sizes of patches and spectrograms that a checkpoint was trained on, from the files of its processors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.config.schema import DataConfig
from finetune.data.media.audio import AudioSettings
from finetune.data.media.patches import PatchSettings
from finetune.models.families import ModelFamily, PositionRule
from finetune.system.errors import ConfigError

# transformers 5 writes the first; checkpoints of Qwen have the others.
_WHOLE = "processor_config.json"
_FILES = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
_FILES["audio"] = _FILES["image"]
_SECTIONS = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}


def _count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**20


def _channels(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(each, int | float) for each in value)


_Keys = dict[str, Callable[[Any], bool]]
_PATCH_KEYS: _Keys = {
    **dict.fromkeys(("patch_size", "merge_size", "temporal_patch_size"), _count),
    **dict.fromkeys(("image_mean", "image_std"), _channels),
}
_AUDIO_KEYS: _Keys = dict.fromkeys(("feature_size", "sampling_rate", "hop_length", "n_fft", "chunk_length"), _count)
# Steps that are always done here; a checkpoint without one of them was trained on other values.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), (True, None)),
    "resample": (3, None),
    "rescale_factor": (1 / 255, None),
    "dither": (0, None),
}


def image_settings(folder: Path | None, cfg: DataConfig) -> PatchSettings:
    """Return the settings of images. folder: of the checkpoint; None: the families' defaults. Raises: ConfigError."""
    return PatchSettings(cfg.image.min_pixels, cfg.image.max_pixels, **_saved(folder, "image", _PATCH_KEYS))


def video_settings(folder: Path | None, cfg: DataConfig) -> PatchSettings:
    """Return the settings of frames, as `image_settings`; a checkpoint may have one file for both."""
    saved = _saved(folder, "image", _PATCH_KEYS) | _saved(folder, "video", _PATCH_KEYS)
    return PatchSettings(cfg.video.min_pixels, cfg.video.max_pixels, **saved)


def audio_settings(folder: Path | None, cfg: DataConfig) -> AudioSettings:
    """Return the settings of audio, as `image_settings`."""
    return AudioSettings(cfg.audio.max_seconds, **_saved(folder, "audio", _AUDIO_KEYS))


def position_rule(family: ModelFamily, folder: Path | None) -> PositionRule:
    """Return how positions count media, as `image_settings`; config.json has the steps of a second."""
    if folder is None:
        return family.positions
    rule = family.positions_of(_content(folder / "config.json"))
    steps = rule.steps_per_second
    if type(steps) not in (int, float) or not 0 < steps < 2**20:
        key = ".".join(family.steps_setting)
        raise ConfigError(
            f"{folder / 'config.json'}: {key} is not valid, found {steps!r}; download the checkpoint again"
        )
    return rule


def _saved(folder: Path | None, kind: str, keys: _Keys) -> dict[str, Any]:
    """Return the values of these keys in a checkpoint; keys that it lacks are left out."""
    if folder is None:
        return {}
    file = folder / _WHOLE
    section = _content(file).get(_SECTIONS[kind])
    if not isinstance(section, dict):
        file = folder / _FILES[kind]
        section = _content(file)
    found = {key: section[key] for key in keys if section.get(key) is not None}
    for key, value in found.items():
        if not keys[key](value):
            raise ConfigError(f"{file}: {key} is not valid, found {value!r}; download the checkpoint again")
    for key, expected in _EXPECTED.items():
        if section.get(key) not in expected:
            raise ConfigError(f"{file}: {key} must be {expected[0]!r}, found {section[key]!r}; use another checkpoint")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); download the checkpoint again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no settings; download the checkpoint again")
    return content
