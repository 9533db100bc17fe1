"""Read videos with PyAV, and choose their frames as Qwen2-VL's processors do. Their sound is not read."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.media.signatures import describe
from finetune.system.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Containers of single files. Playlists, which FFmpeg also opens, name other files and addresses.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,gif"
MOST_PIXELS = 8192 * 8192
# Two hours at 30 frames/s.
MOST_FRAMES = 216_000
_FEWEST_SAMPLED = 4
# Tokens of a video for which Qwen's utilities choose the size of its frames: 0.9 of a context of 128,000.
_MOST_TOKENS = 115_200


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """A decoded video: its frames, their mean rate per second, and their size after rotation."""

    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """Which frames are read: data.video.fps and data.video.max_frames."""

    fps: float
    max_frames: int

    def indices(self, facts: VideoFacts, multiple: int) -> np.ndarray:
        """Return the numbers of the frames to read, [n] int64, evenly over the video.

        Args:
            multiple: n is a multiple of this, unless the video has fewer frames.

        Source: `sample_frames` of transformers' Qwen2VLVideoProcessor, which chooses in float32.
        """
        total = facts.frames
        most = min(self.max_frames, total) // multiple * multiple
        count = min(max(total / facts.fps * self.fps, _FEWEST_SAMPLED), most)
        count = max(1, math.floor(count / multiple) * multiple)
        return (np.arange(count) * (total / count)).astype(np.float32).astype(np.int64)

    def seconds_per_grid(self, facts: VideoFacts, frames: int, multiple: int) -> float:
        """Return the seconds between two steps of the grid, of `multiple` frames each."""
        return multiple * facts.frames / (facts.fps * frames)


def most_pixels(max_pixels: int, min_pixels: int, frames: int, side: int) -> int:
    """Return the limit of pixels of a frame: lower in a video of many frames.

    Args:
        side: of the square of pixels that a token covers.

    Source: `cap_pixels_per_frame` of transformers' Qwen2VLVideoProcessor, after Qwen's utilities.
    """
    return max(min(max_pixels, _MOST_TOKENS * side * side * 2 // frames), int(min_pixels * 1.05))


def video_facts(file: io.FileIO) -> VideoFacts:
    """Decode a whole video, and return its facts. Memory: a few frames. Raises: DataError; MissingExtra."""
    count, size, times = 0, None, []
    with _opened(file) as (container, stream):
        for frame in _frames(container, stream):
            size = size or _size(frame)
            if frame.pts is not None:
                times = [*times[:1], frame.pts]
            count += 1
        if size is None:
            raise DataError("has no frames; replace the file")
        seconds = float((times[-1] - times[0]) * stream.time_base) if times and stream.time_base else 0.0
        return VideoFacts(count, _rate(count, seconds, stream.average_rate), *size)


def read_frames(file: io.FileIO, indices: Iterable[int], height: int, width: int) -> np.ndarray:
    """Return frames by their numbers, resized, [n, height, width, 3] uint8. Raises: DataError; MissingExtra."""
    from finetune.data.media.images import resized

    order = [int(index) for index in indices]
    wanted = set(order)
    found: dict[int, np.ndarray] = {}
    with _opened(file) as (container, stream):
        for number, frame in enumerate(_frames(container, stream)):
            if number in wanted:
                found[number] = resized(_upright(frame), height, width)
            if len(found) == len(wanted):
                break
    if len(found) < len(wanted):
        raise DataError("has fewer frames than when it was measured; start the run again")
    return np.stack([found[index] for index in order])


def _rate(count: int, seconds: float, header: Fraction | None) -> float:
    """Return the mean rate; the header's, unless the time of the frames contradicts it (as at a variable rate)."""
    measured = (count - 1) / seconds if seconds > 0 else None
    if header and (measured is None or abs(measured / float(header) - 1) < 0.02):
        return float(header)
    return measured or 1.0


@contextmanager
def _opened(file: io.FileIO) -> Iterator[tuple[InputContainer, VideoStream]]:
    library = _library()
    from av.stream import Disposition

    start = file.read(4096)
    file.seek(0)
    try:
        # Titles in other encodings than UTF-8 are no reason to refuse a file.
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": ""}
        with library.open(file, options=options, metadata_errors="replace") as container:
            # A cover of a sound is a stream of one frame.
            streams = [each for each in container.streams.video if Disposition.attached_pic not in each.disposition]
            if not streams:
                raise DataError(f"is {describe(start)} without video; use it as audio, or replace the file")
            stream = streams[0]
            if stream.codec_context is None:
                raise DataError(f"is {describe(start)} with a codec that FFmpeg does not have; save it as MP4")
            _check_size(stream.codec_context.height, stream.codec_context.width)
            stream.codec_context.thread_count = 1  # processes decode beside each other
            yield container, stream
    except library.FFmpegError as error:
        what = f"is {describe(start)} that is broken, cut off or not supported as a video"
        raise DataError(f"{what} ({error.strerror}); replace the file, or save it as MP4") from error
    except MemoryError as error:
        raise DataError("needs more memory than there is; save it smaller") from error


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtra('videos need: pip install "finetune-qlora[video]"') from error
    return av


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Decode all frames. Raises: DataError where one is damaged, or the file ends before its header says."""
    packets, count = -1, 0  # the last packet only ends the decoding
    height_width = None
    for packet in container.demux(stream):
        packets += 1
        if packet.is_corrupt:
            raise DataError(f"is cut off or damaged after {count} frames; replace the file")
        for frame in packet.decode():
            count += 1
            height_width = height_width or (frame.height, frame.width)
            if (frame.height, frame.width) != height_width:
                raise DataError(f"changes its size at frame {count}; save it with one size")
            _check_size(frame.height, frame.width)
            if frame.is_corrupt:
                raise DataError(f"is damaged at frame {count}; replace the file")
            if count > MOST_FRAMES:
                raise DataError(f"has more than {MOST_FRAMES:,} frames; cut it into parts")
            yield frame
    if packets < stream.frames:
        raise DataError(f"is cut off: its header says {stream.frames} frames, it has {packets}; replace the file")


def _check_size(height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise DataError(f"has frames of {width} x {height} pixels, the limit is {MOST_PIXELS:,}; save it smaller")
    if height * width == 0:
        raise DataError("has frames without pixels; replace the file")


def _quarter_turns(frame: VideoFrame) -> int:
    return round(frame.rotation / 90) % 4


def _size(frame: VideoFrame) -> tuple[int, int]:
    return (frame.width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, frame.width)


def _upright(frame: VideoFrame) -> np.ndarray:
    """Return [H, W, 3] uint8, turned as the file says for players."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame)))
