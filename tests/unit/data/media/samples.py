"""Small images, sounds and videos, made by the tests that read them."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

from finetune.config.schema import DataConfig
from finetune.data.media.processor import MediaProcessor, build_media_processor
from finetune.models.families import FAMILIES


def processor(family: str = "qwen2_5_omni", **data: Any) -> MediaProcessor:
    return build_media_processor(FAMILIES[family], None, DataConfig.model_validate(data))


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, len(Image.new(mode, (1, 1)).getbands()))
    values = np.random.default_rng(height * width).integers(0, 256, shape, np.uint8)
    return Image.fromarray(values.squeeze(-1) if shape[-1] == 1 else values, mode)


def image_file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tone(seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    """[N] or [N, channels] float32."""
    time = np.arange(round(seconds * rate)) / rate
    each = [np.sin(2 * np.pi * 220 * (1 + channel) * time) for channel in range(channels)]
    samples = np.stack(each, axis=1) * 0.3 + np.random.default_rng(rate).normal(0, 0.01, (len(time), channels))
    return samples.squeeze(-1).astype(np.float32) if channels == 1 else samples.astype(np.float32)


def audio_file(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def clip(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """[frames, H, W, 3] uint8: a bright square that moves over a ramp, one step per frame."""
    ramp = np.linspace(0, 120, height * width).reshape(height, width, 1)
    values = np.broadcast_to(ramp, (frames, height, width, 3)).astype(np.uint8).copy()
    for number, frame in enumerate(values):
        frame[8:24, 4 * number % width :][:, :16] = 250 - number
    return values


def video_file(
    frames: np.ndarray,
    kind: str = "mp4",
    codec: str = "mpeg4",
    *,
    times: list[int] | None = None,
    rotation: int = 0,
) -> bytes:
    """A video of 10 frames/s, or with the time of each frame in tenths of a second; lossless with ffv1 in matroska."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        track = container.add_stream(codec, rate=10)
        track.height, track.width = frames.shape[1:3]
        track.pix_fmt = {"ffv1": "bgr0", "gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        if rotation:
            track.set_display_rotation(rotation)
        container.start_encoding()
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number if times is None else times[number]
            container.mux(track.encode(picture))
        container.mux(track.encode(None))
    return stream.getvalue()
