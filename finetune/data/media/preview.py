"""What a page shows of a file: a small picture, its name and its length."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from finetune.data.media.audio import audio_seconds
from finetune.data.media.files import opened
from finetune.data.media.images import read_image, thumbnail
from finetune.data.media.media import Media
from finetune.data.media.video import read_frames, video_facts
from finetune.system.errors import InputError
from finetune.system.format import format_duration

_SIDE = 160  # pixels of the longer side
_MOST_SOUND_BYTES = 200_000
# First bytes of audio files from an offset on, and their media type.
_PLAYED = (
    (8, b"WAVE", "wav"),
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (0, b"ID3", "mpeg"),
    (0, b"\xff\xfb", "mpeg"),
)
_IN_CACHE = re.compile(r"[0-9a-f]{64}")  # the name of embedded bytes


@dataclass(frozen=True, slots=True)
class Preview:
    """A file for people.

    text: as `video ball.mp4, 4.2 s, 640 tokens`.
    picture: a data URI of an image or of a video's first frame; empty for audio and for a file that cannot be read.
    sound: a data URI of a small audio file that browsers play; otherwise empty.
    """

    text: str
    picture: str
    sound: str = ""


def preview(media: Media) -> Preview:
    """Return the preview of a measured file, which may be missing by now."""
    name = Path(media.path).name
    known = [media.kind if _IN_CACHE.fullmatch(name) else f"{media.kind} {name}"]
    picture = sound = ""
    try:
        with opened(media.path, media.kind) as file:
            if media.kind == "audio":
                known.append(format_duration(audio_seconds(file)))
                sound = _sound(file)
            elif media.kind == "image":
                picture = _uri(thumbnail(read_image(file), _SIDE))
            else:
                facts = video_facts(file)
                known.append(format_duration(facts.frames / facts.fps))
                file.seek(0)
                [first] = read_frames(file, [0], facts.height, facts.width)
                picture = _uri(thumbnail(first, _SIDE))
    except InputError:  # the file is gone, or the library that reads it
        known.append("cannot be read")
    return Preview(", ".join([*known, f"{media.tokens:,} tokens"]), picture, sound)


def _sound(file: io.FileIO) -> str:
    """Return a data URI of an audio file, empty if it is large or of a type that browsers do not play."""
    file.seek(0)
    content = file.read(_MOST_SOUND_BYTES + 1)
    kind = next((kind for offset, start, kind in _PLAYED if content[offset:].startswith(start)), None)
    return "" if kind is None or len(content) > _MOST_SOUND_BYTES else _uri(content, f"audio/{kind}")


def _uri(content: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
