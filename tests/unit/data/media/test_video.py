"""Videos: the frames, sizes and seconds that the official processors choose."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from finetune.data.media.patches import PatchSettings
from finetune.data.media.video import FrameSampling, VideoFacts, most_pixels
from tests.unit.data.media.samples import clip, processor, video_file

LIMITS = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 6}


def official_indices(total: int, fps: float, wanted: float, most: int) -> list[int]:
    """`sample_frames` of transformers' Qwen2VLVideoProcessor, which cannot be imported without torchvision."""
    most = math.floor(min(most, total) / 2) * 2
    count = min(max(total / fps * wanted, 4), most, total)
    count = math.floor(count / 2) * 2
    return torch.arange(0, total, total / count).int().tolist()


@given(
    total=st.integers(2, 5000),
    fps=st.sampled_from([1.0, 10.0, 23.976, 24.0, 25.0, 29.97, 30000 / 1001, 60.0]),
    wanted=st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.7, 100.0]),
    most=st.integers(2, 768),
)
@settings(max_examples=500, deadline=None)
def test_frames_are_the_official_ones(total: int, fps: float, wanted: float, most: int):
    ours = FrameSampling(wanted, most).indices(VideoFacts(total, fps, 1, 1), 2).tolist()
    official = official_indices(total, fps, wanted, most)
    # Rounding gives the official function one frame more than it planned, for some lengths.
    assert ours == official[: len(ours)]
    assert len(ours) % 2 == 0 and len(official) - len(ours) in (0, 1)


@given(frames=st.integers(1, 768))
def test_the_frames_of_a_long_video_are_smaller_as_in_the_reference(frames: int):
    total = int(128_000 * 28 * 28 * 0.9)
    smallest, largest = 128 * 28 * 28, 768 * 28 * 28
    expected = max(min(largest, total * 2 // frames), int(smallest * 1.05))
    assert most_pixels(largest, smallest, frames, 28) == expected


def test_patches_are_those_of_the_frames_in_pairs():
    options = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    frames = np.random.default_rng(0).integers(0, 256, (6, 16, 24, 3), np.uint8)
    ours = PatchSettings(64, 10**6, **options).patches(frames).reshape(3, -1, 3, 2, 4, 4)
    image = Qwen2VLImageProcessorPil(**options, min_pixels=64)
    for number, frame in enumerate(frames):
        official = image(Image.fromarray(frame), return_tensors="np")["pixel_values"].reshape(-1, 3, 2, 4, 4)
        assert np.array_equal(ours[number // 2, :, :, number % 2], official[:, :, 0])


def test_an_odd_number_of_frames_repeats_the_last_one():
    frames = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    settings_ = PatchSettings(1, 10**6)
    assert np.array_equal(settings_.patches(frames), settings_.patches(frames[[0, 1, 2, 2]]))


def test_a_file_is_decoded_sampled_and_resized():
    ours, frames = processor(video={**LIMITS, "fps": 5.0}), clip(20)
    media = ours.measure("video", video_file(frames, "matroska", "ffv1"))
    assert media.grid == (5, 4, 6) and media.tokens == 30
    assert media.seconds_per_grid == pytest.approx(2 / 5)
    expected = [Image.fromarray(frame).resize((84, 56), Image.Resampling.BICUBIC) for frame in frames[::2]]
    assert np.array_equal(ours.pixels(media), ours.video.patches(np.stack([np.asarray(each) for each in expected])))


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("mp4", "mpeg4"),
        ("mp4", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mjpeg"),
        ("mpegts", "mpeg4"),
        ("gif", "gif"),
    ],
)
def test_containers_and_codecs(kind: str, codec: str):
    ours, frames = processor(video={**LIMITS, "fps": 5.0}), clip(20)
    media = ours.measure("video", video_file(frames, kind, codec))
    assert media.grid == (5, 4, 6) and media.seconds_per_grid == pytest.approx(0.4)
    lossless = ours.measure("video", video_file(frames, "matroska", "ffv1"))
    assert np.abs(ours.pixels(media) - ours.pixels(lossless)).mean() < 0.25


def test_a_rotated_video_is_upright_as_players_show_it():
    ours, frames = processor(video=LIMITS), clip(10)
    upright = ours.measure("video", video_file(np.rot90(frames, axes=(1, 2)), "matroska", "ffv1"))
    rotated = ours.measure("video", video_file(frames, "mov", "mpeg4", rotation=90))
    assert rotated.grid == upright.grid == (2, 6, 4)
    assert np.abs(ours.pixels(rotated) - ours.pixels(upright)).mean() < 0.25


def test_the_seconds_of_a_variable_rate_are_those_of_the_clock():
    times = [*range(10), *range(10, 100, 10)]  # a second at 10 frames/s, then 9 at 1
    ours = processor(video={**LIMITS, "fps": 1.0})
    media = ours.measure("video", video_file(clip(19), "mp4", "libx264", times=times))
    seconds = media.seconds_per_grid * media.grid[0]
    assert 8.5 < seconds < 11


@pytest.mark.parametrize(("frames", "grid"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_short_videos(frames: int, grid: int):
    media = processor(video=LIMITS).measure("video", video_file(clip(frames)))
    assert media.grid[0] == grid
    assert processor(video=LIMITS).pixels(media).shape == (math.prod(media.grid), 1176)


def test_at_most_max_frames_are_read_over_the_whole_video():
    media = processor(video={**LIMITS, "max_frames": 5}).measure("video", video_file(clip(40)))
    assert media.grid[0] == 2 and media.seconds_per_grid == pytest.approx(2.0)
