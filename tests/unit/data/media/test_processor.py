"""The processor of a model: its kinds, the sizes of its checkpoint, records that survive, no torch."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from finetune.config.schema import DataConfig
from finetune.data.media.media import Media
from finetune.data.media.processor import MediaProcessor, build_media_processor
from finetune.models.families import FAMILIES
from finetune.system.errors import ConfigError, MissingExtra
from tests.unit.data.media.samples import audio_file, clip, image_file, picture, processor, tone, video_file

FILES = {
    "image": image_file(picture(40, 60)),
    "audio": audio_file(tone(0.5)),
    "video": video_file(clip(8)),
}
# preprocessor_config.json of Qwen/Qwen2.5-VL-7B-Instruct, and of Qwen/Qwen2.5-Omni-7B without equal keys.
VL = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
OMNI = VL | {
    "chunk_length": 300,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right",
    "padding_value": 0.0,
    "processor_class": "Qwen2_5OmniProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
}


def of_folder(folder: Path, **files: dict[str, Any]) -> MediaProcessor:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return build_media_processor(FAMILIES["qwen2_5_omni"], folder, DataConfig())


@pytest.mark.parametrize("saved", [VL, OMNI])
def test_the_defaults_are_those_of_both_families(saved: dict[str, Any], tmp_path: Path):
    assert of_folder(tmp_path, preprocessor_config=saved) == processor() == of_folder(tmp_path / "..")


def test_a_checkpoint_decides_the_sizes_and_the_config_the_limits(tmp_path: Path):
    saved = OMNI | {"patch_size": 8, "image_mean": [0.5, 0.5, 0.5], "feature_size": 80, "hop_length": 80}
    ours = of_folder(tmp_path, preprocessor_config=saved, video_preprocessor_config={"temporal_patch_size": 4})
    assert (ours.image.patch_size, ours.image.image_mean, ours.image.max_pixels) == (8, (0.5,) * 3, 1280 * 28 * 28)
    assert (ours.video.patch_size, ours.video.temporal_patch_size) == (8, 4)
    assert (ours.audio.feature_size, ours.audio.hop_length, ours.audio.max_seconds) == (80, 80, 300)
    assert ours.mel(ours.measure("audio", FILES["audio"])).shape == (80, 100)


def test_the_one_file_of_newer_versions_is_read_as_they_write_it(tmp_path: Path):
    image, audio = Qwen2VLImageProcessorPil(patch_size=16, merge_size=1), WhisperFeatureExtractor(feature_size=64)
    image.save_pretrained(tmp_path)
    whole = {"image_processor": image.to_dict(), "feature_extractor": json.loads(audio.to_json_string())}
    for files in ({"processor_config": whole}, {}):
        ours = of_folder(tmp_path, **files)
        assert (ours.image.patch_size, ours.image.merge_size, ours.video.patch_size) == (16, 1, 16)
        assert ours.audio.feature_size == (64 if files else 128)
        (tmp_path / "processor_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"patch_size": 0}, "patch_size"), ({"merge_size": "2"}, "merge_size"), ({"image_std": [1]}, "image_std")]
    + [({"do_resize": False}, "do_resize"), ({"resample": 2}, "resample"), ({"rescale_factor": 1}, "rescale_factor")]
    + [({"dither": 0.1}, "dither"), ({"sampling_rate": True}, "sampling_rate")],
)
def test_settings_that_are_not_followed_here_are_refused(change: dict[str, Any], key: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: {key} "):
        of_folder(tmp_path, preprocessor_config=OMNI | change)


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_damaged_file_of_settings_is_refused(content: str, tmp_path: Path):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match="download the checkpoint again"):
        of_folder(tmp_path)


@pytest.mark.parametrize("kind", FILES)
def test_a_record_survives_json(kind: str):
    media = processor().measure(kind, FILES[kind])
    assert Media.from_dict(json.loads(json.dumps(media.as_dict()))) == media
    assert len(media.digest) == 16


@pytest.mark.parametrize("kind", FILES)
def test_a_digest_changes_with_the_content_and_with_every_setting_that_decides_the_values(kind: str):
    other = {"image": picture(40, 61), "audio": {"array": tone(0.4), "sampling_rate": 16_000}}
    other["video"] = video_file(clip(9))
    digest = processor().measure(kind, FILES[kind]).digest
    assert processor().measure(kind, other[kind]).digest != digest
    deciding = {"image": {"image": {"max_pixels": 10**5}}, "video": {"video": {"fps": 1.0}}, "audio": {}}
    changed = processor(**deciding[kind])
    assert (changed.measure(kind, FILES[kind]).digest == digest) == (kind == "audio")
    limits = {"max_length": 77, "audio": {"max_seconds": 9.0}}  # these decide what is refused, and no value
    assert processor(**limits).measure(kind, FILES[kind]).digest == digest


WORKER = """
import hashlib, json, pickle, sys
ours, files = pickle.load(sys.stdin.buffer)
media = [ours.measure(kind, content) for kind, content in files.items()]
values = [ours.mel(each) if each.kind == "audio" else ours.pixels(each) for each in media]
sums = [hashlib.sha256(value).hexdigest() for value in values]
print(json.dumps(["torch" in sys.modules, [each.as_dict() for each in media], sums]))
"""


def test_a_worker_reads_all_kinds_without_torch_and_gets_the_same_values():
    """A processor goes to another process by pickle."""
    sent, root = pickle.dumps((processor(), FILES)), Path(__file__).parents[4]
    worker = subprocess.run([sys.executable, "-c", WORKER], input=sent, capture_output=True, check=True, cwd=root)
    has_torch, records, sums = json.loads(worker.stdout)
    assert not has_torch
    for kind, record, digest in zip(FILES, records, sums, strict=True):
        media = processor().measure(kind, FILES[kind])
        assert media == Media.from_dict(record)
        values = processor().mel(media) if kind == "audio" else processor().pixels(media)
        assert hashlib.sha256(values).hexdigest() == digest


@pytest.mark.parametrize(
    ("kind", "library", "extra"),
    [("image", "PIL", "vision"), ("audio", "soundfile", "audio"), ("video", "av", "video")],
)
def test_an_absent_library_is_answered_with_the_command(
    kind: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf'pip install "finetune-qlora\[{extra}\]"'):
        processor().measure(kind, FILES[kind])
