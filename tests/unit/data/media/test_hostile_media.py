"""Damaged, huge and disguised media: each is refused with its reason, in little time and memory."""

from __future__ import annotations

import io
import resource
import struct
import warnings
import zlib
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.system.errors import DataError
from tests.unit.data.media.samples import audio_file, clip, image_file, picture, processor, tone, video_file

JPEG, PNG = image_file(picture(60, 80), "JPEG"), image_file(picture(60, 80))
WAV, MP4 = audio_file(tone(1)), video_file(clip(20))
TIFF = image_file(picture(60, 80), "TIFF")
# Far below what any of these files would take if it were decoded.
MOST_MEMORY_BYTES = 300 * 2**20


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(height: int, width: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def bomb(height: int, width: int) -> bytes:
    """A small file of many equal pixels."""
    packed = zlib.compressobj(9)
    line = packed.compress(bytes(1 + 3 * width))
    return png(height, width, chunk(b"IDAT", line + packed.flush()))


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def wav(rate: int = 16_000, channels: int = 1, bits: int = 16, data: bytes = b"\0\0" * 16_000) -> bytes:
    frame = channels * bits // 8
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * frame % 2**32, frame % 2**16, bits)
    body = b"WAVE" + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def broken_samples(value: float) -> bytes:
    samples = tone(0.5)
    samples[4000] = value
    return audio_file(samples, subtype="FLOAT")


def tiff_of_itself() -> bytes:
    """Its only directory names itself as the next one, and has no image."""
    return b"II*\0" + struct.pack("<IHI", 8, 0, 8)


def muxed(kind: str, codec: str) -> bytes:
    """Audio in a container of videos."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        track = container.add_stream(codec, rate=48_000, layout="mono")
        samples = (tone(0.5, 48_000)[None] * 32_000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 48_000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return stream.getvalue()


def two_sizes() -> bytes:
    """Motion JPEG: every packet is a JPEG file, and the last one is larger."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="avi") as container:
        track = container.add_stream("mjpeg", rate=10)
        track.height, track.width, track.pix_fmt = 60, 80, "yuvj420p"
        for number, size in enumerate([(60, 80)] * 5 + [(80, 60)]):
            packet = av.Packet(image_file(picture(*size), "JPEG"))
            packet.stream, packet.time_base = track, Fraction(1, 10)
            packet.pts = packet.dts = number
            container.mux(packet)
    return stream.getvalue()


def damaged_inside(content: bytes, start: float, end: float) -> bytes:
    a, b = int(len(content) * start), int(len(content) * end)
    return content[:a] + np.random.default_rng(0).bytes(b - a) + content[b:]


def without_last_frame() -> bytes:
    """An MP4 file with its index in front, as in web pages, that ends where its last frame would begin."""
    at, index_at = MP4.index(b"mdat") - 4, MP4.rindex(b"moov") - 4
    head, frames, index = MP4[:at], MP4[at:index_at], MP4[index_at:]
    field = index.index(b"stco") + 12  # where the frames are, after the number of such places, which is one
    moved = int.from_bytes(index[field : field + 4], "big") + len(index)
    index = patched(index, field, struct.pack(">I", moved))
    return (head + index + frames)[: -len(frames) + frames.rindex(b"\0\0\x01\xb6")]


def with_gap() -> bytes:
    """A recording of broadcasts that lost ten packets of 188 bytes."""
    content = video_file(clip(40), "mpegts", "mpeg4")
    return content[: 188 * 50] + content[188 * 60 :]


def without_end(kind: str, codec: str, share: float) -> bytes:
    content = video_file(clip(40), kind, codec)
    return content[: int(len(content) * share)]


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
HTML = b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>"
NOISE = np.random.default_rng(1).bytes(5000)
DISGUISED = {
    "html": (HTML, "a page of HTML"),
    "git-lfs-pointer": (LFS, "Git LFS"),
    "text": (b"just some words, in a file with another name", "is text"),
    "noise": (NOISE, "unknown format|broken"),
    "zeros": (bytes(100_000), "unknown format|broken"),
    "one-byte": (b"\xff", "unknown format|broken"),
    "pdf": (b"%PDF-1.7\n" + NOISE, "a PDF"),
    "pickle": (b"\x80\x04" + NOISE, "pickle"),
    "zip": (b"PK\x03\x04" + NOISE, "ZIP"),
    "playlist": (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "playlist"),
    "list-of-ffmpeg": (b"ffconcat version 1.0\nfile /etc/passwd\n", "playlist"),
    "sdp-of-a-network-stream": (b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\nc=IN IP4 127.0.0.1\n", "text"),
}
IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "jpeg-cut-off": (lambda: JPEG[: len(JPEG) // 2], "broken or cut off"),
    "jpeg-header-only": (lambda: JPEG[:20], "not an image|broken"),
    "png-cut-off": (lambda: PNG[: len(PNG) // 2], "broken or cut off"),
    "png-checksum": (lambda: patched(PNG, 40, b"\0\0\0\0\0"), "broken"),
    "png-without-pixels": (lambda: png(10, 10), "broken or cut off"),
    "png-of-bad-zlib": (lambda: png(10, 10, chunk(b"IDAT", NOISE)), "broken or cut off"),
    "png-too-few-lines": (lambda: png(100, 100, chunk(b"IDAT", zlib.compress(bytes(50)))), "broken or cut off"),
    "bomb-of-pixels": (lambda: bomb(60_000, 60_000), "pixels"),
    "bomb-at-the-limit-of-pillow": (lambda: bomb(10_000, 10_000), "pixels"),
    "bomb-of-the-largest-numbers": (lambda: png(2**31 - 1, 2**31 - 1, chunk(b"IDAT", b"")), "pixels"),
    "bomb-of-text": (lambda: png(9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))), "broken or cut off"),
    "png-of-width-zero": (lambda: png(10, 0, chunk(b"IDAT", zlib.compress(b""))), "pixels|broken"),
    "gif-of-size-zero": (lambda: b"GIF89a" + bytes(20) + b";", "pixels|broken|not an image"),
    "gif-bomb": (lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b"," + bytes(20), "pixels|broken"),
    "gif-cut-off": (lambda: image_file(picture(60, 80), "GIF")[:-900], "broken or cut off"),
    "webp-cut-off": (lambda: image_file(picture(60, 80), "WEBP")[:-900], "broken|not an image"),
    "avif-cut-off": (lambda: image_file(picture(60, 80), "AVIF")[:-900], "broken|not an image"),
    "bmp-cut-off": (lambda: image_file(picture(60, 80), "BMP")[:-900], "broken or cut off"),
    "bmp-bomb": (lambda: patched(image_file(picture(9, 9), "BMP"), 18, struct.pack("<ii", 2**30, 2**30)), "pixels"),
    "tiff-cut-off": (lambda: TIFF[: len(TIFF) // 2], "broken|not an image"),
    "tiff-that-names-itself": (tiff_of_itself, "broken|not an image"),
    "tiff-of-float": (lambda: image_file(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "floating-point"),
    "tiff-of-32-bits": (lambda: image_file(Image.fromarray(np.full((9, 9), 10**6, np.int32)), "TIFF"), "0 to 65535"),
    "too-elongated": (lambda: image_file(Image.new("RGB", (201, 1))), "200 times"),
    "too-high": (lambda: image_file(Image.new("L", (10, 2001))), "200 times"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "svg-after-xml": (lambda: b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x -->\n<svg/>", "SVG"),
    "heic": (lambda: HEIC, "HEIC"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
    "audio": (lambda: WAV, "WAV audio"),
    "video": (lambda: MP4, "MP4"),
}
AUDIO: dict[str, tuple[Callable[[], bytes], str]] = {
    "wav-without-samples": (lambda: wav(data=b""), "no samples"),
    "wav-header-only": (lambda: WAV[:30], "cut off|broken"),
    "wav-cut-off": (lambda: WAV[:-5000], "cut off"),
    "wav-of-rate-zero": (lambda: wav(rate=0), "samples/s|broken"),
    "wav-of-absurd-rate": (lambda: wav(rate=2**31 - 1), "samples/s|broken"),
    "wav-of-rate-one": (lambda: wav(rate=1, data=bytes(40)), "samples/s"),
    "wav-of-many-channels": (lambda: wav(channels=200, data=bytes(40_000)), "channels"),
    "wav-of-no-channels": (lambda: wav(channels=0), "channels|broken"),
    "nan": (lambda: broken_samples(np.nan), r"NaN or infinity, first at 0\.250 s"),
    "infinity": (lambda: broken_samples(-np.inf), "NaN or infinity"),
    "integers-in-a-float-file": (lambda: audio_file(tone(0.5) * 32_768, subtype="FLOAT"), "expected -1 to 1"),
    "too-long": (lambda: audio_file(np.zeros(16_000 * 11, np.int16)), "limit is 10 s"),
    "too-long-in-few-bytes": (lambda: audio_file(np.zeros(16_000 * 600, np.int16), kind="FLAC"), "limit is 10 s"),
    "too-short": (lambda: audio_file(tone(0.02)), "no token"),
    "one-sample": (lambda: audio_file(np.zeros(1, np.int16)), "no token"),
    "flac-cut-off": (lambda: audio_file(tone(1), kind="FLAC")[:-9000], "cut off|broken"),
    "flac-damaged": (lambda: damaged_inside(audio_file(tone(1), kind="FLAC"), 0.3, 0.7), "cut off|broken"),
    "mp3-without-sound": (lambda: b"ID3\x04\0\0\0\0\0\x0a" + bytes(5000), "broken|no samples"),
    "ogg-header-only": (lambda: audio_file(tone(1), kind="OGG")[:60], "broken"),
    "ogg-video": (lambda: b"OggS" + NOISE, "broken"),
    "m4a": (lambda: muxed("ipod", "aac"), "M4A"),
    "webm": (lambda: muxed("webm", "libopus"), "WebM"),
    "image": (lambda: PNG, "PNG image"),
    "video": (lambda: MP4, "MP4"),
}
VIDEOS: dict[str, tuple[Callable[[], bytes], str]] = {
    "audio-only": (lambda: muxed("mp4", "aac"), "without video"),
    "audio-only-webm": (lambda: muxed("webm", "libopus"), "without video"),
    "audio": (lambda: WAV, "WAV audio"),
    "image": (lambda: PNG, "PNG image"),
    "mp4-without-index": (lambda: MP4[: len(MP4) // 2], "cut off"),
    "mp4-header-only": (lambda: MP4[:32], "cut off"),
    "avi-cut-off": (lambda: without_end("avi", "mjpeg", 0.5), "cut off|damaged"),
    "mp4-without-its-last-frame": (without_last_frame, "cut off"),
    "transport-stream-with-a-gap": (with_gap, "damaged after 13 frames"),
    "mkv-of-noise": (lambda: b"\x1aE\xdf\xa3" + NOISE, "broken"),
    "mkv-of-endless-size": (lambda: b"\x1aE\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xfe" + bytes(2000), "broken"),
    "damaged-frames": (lambda: damaged_inside(MP4, 0.1, 0.6), "broken|damaged|cut off"),
    "no-frames": (lambda: video_file(clip(0)), "no frames|without video|broken"),
    "changing-size": (two_sizes, "changes its size"),
    "too-elongated": (lambda: video_file(clip(4, 16, 16 * 201), "matroska", "ffv1"), "200 times"),
    "huge-frames": (
        lambda: video_file(clip(4), "avi", "rawvideo").replace(
            struct.pack("<II", 96, 64), struct.pack("<II", 30_000, 30_000)
        ),
        "pixels|broken",
    ),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
}
CASES = {
    **{f"image-{name}": ("image", make, reason) for name, (make, reason) in IMAGES.items()},
    **{f"audio-{name}": ("audio", make, reason) for name, (make, reason) in AUDIO.items()},
    **{f"video-{name}": ("video", make, reason) for name, (make, reason) in VIDEOS.items()},
    **{
        f"{kind}-that-is-{name}": (kind, lambda content=content: content, reason)
        for name, (content, reason) in DISGUISED.items()
        for kind in ("image", "audio", "video")
    },
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", CASES)
def test_a_file_that_cannot_be_used_is_refused_with_its_reason(name: str, capfd: pytest.CaptureFixture[str]):
    kind, make, reason = CASES[name]
    content = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings(), pytest.raises(DataError, match=reason) as caught:
        warnings.simplefilter("error")
        processor(audio={"max_seconds": 10.0}).measure(kind, content)
    message = str(caught.value)
    assert message.startswith(f"{kind} of {len(content)} bytes ") and message.isprintable() and len(message) < 500
    assert ";" in message  # what was found; what to do
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY_BYTES
    assert capfd.readouterr() == ("", "")  # libraries write nothing of their own


FUZZED = {
    "image": [JPEG, PNG, TIFF, *(image_file(picture(60, 80), kind) for kind in ("GIF", "WEBP", "BMP", "AVIF"))],
    "audio": [WAV, *(audio_file(tone(0.3), kind=kind) for kind in ("FLAC", "OGG"))],
    "video": [MP4, video_file(clip(8), "webm", "libvpx-vp9"), video_file(clip(8), "avi", "mjpeg")],
}


@pytest.mark.parametrize("kind", FUZZED)
@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_ends_in_our_error_or_in_a_file_that_can_be_read(kind: str, data: st.DataObject):
    content = bytearray(data.draw(st.sampled_from(FUZZED[kind])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 200))
        new = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(new)] = new
    ours = processor()
    try:
        media = ours.measure(kind, bytes(content))
    except DataError:
        return
    values = ours.mel(media) if kind == "audio" else ours.pixels(media)
    assert np.isfinite(values).all()
