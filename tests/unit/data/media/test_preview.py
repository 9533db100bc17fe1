"""What pages show of a file."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data.media.preview import Preview, preview
from tests.unit.data.media.samples import audio_file, clip, image_file, picture, processor, tone, video_file


def shown(kind: str, content: bytes, folder: Path, name: str) -> Preview:
    (folder / name).write_bytes(content)
    return preview(processor().measure(kind, name, folder))


def decoded(uri: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_an_image_is_small_and_keeps_its_proportions(tmp_path: Path):
    large = shown("image", image_file(Image.new("RGB", (1280, 640), "red")), tmp_path, "red.png")
    assert large.text == "image red.png, 1,058 tokens"
    assert decoded(large.picture).size == (160, 80) and len(large.picture) < 4000
    assert decoded(shown("image", image_file(picture(40, 30)), tmp_path, "a.png").picture).size == (30, 40)


def test_of_a_video_the_first_frame_and_its_length_are_shown(tmp_path: Path):
    frames = clip(42)
    ball = shown("video", video_file(frames), tmp_path, "ball.mp4")
    assert ball.text.startswith("video ball.mp4, 4.2 s, ")
    assert np.abs(np.asarray(decoded(ball.picture)).astype(int) - frames[0]).mean() < 12


def test_of_audio_its_length_is_shown(tmp_path: Path):
    found = shown("audio", audio_file(tone(3)), tmp_path, "tone.wav")
    assert (found.text, found.picture) == ("audio tone.wav, 3.0 s, 75 tokens", "")


def test_embedded_bytes_have_no_name():
    assert preview(processor().measure("audio", audio_file(tone(3)))).text == "audio, 3.0 s, 75 tokens"


@pytest.mark.parametrize("left", [b"", b"no image", None])
def test_a_file_that_is_gone_is_named(left: bytes | None, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(image_file(picture(56, 56)))
    media = processor().measure("image", "a.png", tmp_path)
    (tmp_path / "a.png").unlink() if left is None else (tmp_path / "a.png").write_bytes(left)
    assert preview(media) == Preview("image a.png, cannot be read, 4 tokens", "")


def test_a_small_sound_is_embedded_if_browsers_play_it(tmp_path: Path):
    short = shown("audio", audio_file(tone(0.5)), tmp_path, "a.wav")
    head, _, body = short.sound.partition(",")
    assert head == "data:audio/wav;base64" and base64.b64decode(body) == (tmp_path / "a.wav").read_bytes()
    assert shown("audio", audio_file(tone(20)), tmp_path, "long.wav").sound == ""
