"""Read the media of a row: columns and tags in its texts, parts of a content, or the file of a metadata row."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

from finetune.data.formats.messages import Conversation, MediaPart, Message, Turn
from finetune.data.formats.values import Fields, as_json, as_text, is_empty, kind, listed
from finetune.data.media.media import MediaKind
from finetune.data.sources.paths import METADATA
from finetune.system.errors import DataError

# Our name of a column to the kind of its files, which is also another name of the column.
MEDIA_COLUMNS: dict[str, MediaKind] = {"images": "image", "audios": "audio", "videos": "video"}
# Types of the parts of a content, in the APIs of OpenAI and in Qwen's and transformers' examples.
MEDIA_PARTS: dict[str, MediaKind] = {
    name: found for found in MEDIA_COLUMNS.values() for name in (found, f"{found}_url", f"input_{found}")
}
# Keys of a part that decide nothing.
_IGNORED = frozenset({"type", "id", "index", "detail"})
_FILE_NAME = "file_name"
_TAG = re.compile("<(image|audio|video)>")
_ADDRESS = re.compile(r"(?:data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_SUFFIXES = {
    "images": frozenset(".png .jpg .jpeg .webp .bmp .gif .tif .tiff".split()),
    "audios": frozenset(".wav .flac .ogg .oga .opus .mp3 .m4a".split()),
    "videos": frozenset(".mp4 .m4v .mkv .webm .mov .avi .mpg .mpeg".split()),
}


def read_parts(parts: Sequence[Any], location: str) -> tuple[str, tuple[MediaPart, ...]]:
    """Read a content of several parts: its text, and its media; a medium without a file takes the next of a column.

    Raises: DataError naming the part.
    """
    text, media = "", []
    for i, part in enumerate(parts):
        place = f"{location}[{i}]"
        if not isinstance(part, Mapping):
            raise DataError(f"{place} must be an object with type and text, found {kind(part)}")
        if isinstance(name := part.get("type"), str) and name in MEDIA_PARTS:
            media.append(MediaPart(MEDIA_PARTS[name], _of_part(part, name, place), len(text)))
        elif name == "text":
            text += as_text(part.get("text"), f"{place}.text")
        else:
            found = repr(name) if isinstance(name, str) else kind(name)
            raise DataError(f"{place}.type is {found}; it must be 'text' or one of {listed(MEDIA_PARTS)}")
    return text, tuple(media)


def write_parts(message: Message) -> list[dict[str, Any]]:
    """Return the content of a message with media as a list of parts, which `read_parts` reads."""
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind, part.kind: _text_of(part)}
        for part in message.parts
    ]


def row_of(messages: Sequence[Message]) -> dict[str, Any]:
    """Return a training row of a conversation: tags in the texts, and the files in columns; `attach_media` reads it.

    Where a text holds such a tag itself, the contents are lists of parts, which have no tags.
    """
    if any(_TAG.search(message.content) for message in messages):
        contents = [{"content": write_parts(message)} if message.media else {} for message in messages]
        return {"messages": [message.as_dict() | content for message, content in zip(messages, contents, strict=True)]}
    row: dict[str, Any] = {"messages": [message.as_dict() | {"content": message.shown} for message in messages]}
    for column, found in MEDIA_COLUMNS.items():
        if files := [_text_of(part) for message in messages for part in message.media if part.kind == found]:
            row[column] = files
    return row


def _text_of(part: MediaPart) -> str:
    if isinstance(part.reference, str):
        return part.reference
    return "data:;base64," + base64.b64encode(part.reference).decode()


def _of_part(part: Mapping[str, Any], name: str, location: str) -> str | bytes:
    found = MEDIA_PARTS[name]
    keys = (found, f"{found}_url", f"input_{found}", "url", "path")
    given = [key for key, value in part.items() if not is_empty(value) and key not in _IGNORED]
    if unknown := set(given) - set(keys):
        raise DataError(
            f"{location} has {listed(unknown)}, which would be ignored; remove it (data.{found} holds settings for "
            "all rows)"
        )
    if len(given) > 1:
        raise DataError(f"{location} has both {' and '.join(given)}; keep one of them")
    if given:
        return _reference(part[given[0]], f"{location}.{given[0]}")
    if name != found:
        raise DataError(f"{location} of type {name!r} has no file; it must have one of {listed(keys)}")
    return ""


def _reference(value: Any, location: str) -> str | bytes:
    """Return the path, address or bytes of one file. Raises: DataError for other values."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            value, location = value["bytes"], f"{location}.bytes"
            if not isinstance(value, bytes):
                raise DataError(f"{location} must be bytes, as in a table, found {kind(value)}; write a data URI")
        elif isinstance(value.get("data"), str) and isinstance(value.get("format"), str):
            value = f"data:audio/{value['format']};base64,{value['data']}"
        elif key := next((key for key in ("url", "path") if not is_empty(value.get(key))), None):
            value, location = value[key], f"{location}.{key}"
        else:
            raise DataError(
                f"{location} must have a path, a url, bytes, or data and format; it has the keys {listed(value)}"
            )
    if isinstance(value, bytes):
        if not value:
            raise DataError(f"{location} holds no byte")
        return value
    if not as_text(value, location).strip():
        raise DataError(f"{location} is empty; it must be the path of a file")
    return str(value)


@dataclass(slots=True)
class _Files:
    """The files of one column. alone: a file that is not in a list, so that it needs no tag. used: by tags so far."""

    name: str
    files: list[str | bytes]
    alone: bool
    used: int = 0


def attach_media(row: Fields, turns: Sequence[Turn]) -> list[Turn]:
    """Give the files of a row's columns to the tags in its texts, over all turns in order.

    A tag is text in a row whose column of that kind is missing or null. A single file, not in a list, without any tag
    stands before the first text of the user.

    Raises: DataError naming the turn, for a tag without a file, a file without a tag, and media of the assistant.
    """
    columns = {found: _files(row, column) for column, found in MEDIA_COLUMNS.items() if row.get(column) is not None}
    if not columns and not any(turn.message.media for turn in turns):
        return list(turns)
    attached = [Turn(turn.location, _attached(turn, columns)) for turn in turns]
    several = [turn for turn in attached if turn.message.media]
    left = [files for files in columns.values() if files.used < len(files.files)]
    if not several and len(left) == 1 and left[0].alone:
        first = next((i for i, turn in enumerate(attached) if turn.message.role == "user"), None)
        if first is None:
            raise DataError(f"{left[0].name} is a file, and the row has no turn of the user to hold it")
        message = attached[first].message
        [found] = (found for found, files in columns.items() if files is left[0])
        part = MediaPart(found, left[0].files[0], 0)
        attached[first] = replace(attached[first], message=replace(message, media=(part,)))
    elif left:
        found = next(found for found, files in columns.items() if files is left[0])
        files = left[0]
        raise DataError(
            f"{files.name}: file {files.used + 1} of {len(files.files)} has no tag <{found}> in the texts; write the "
            "tag where it stands"
        )
    return attached


def holds_files(row: Mapping[str, Any]) -> bool:
    """Return whether a row has a column of files that is not empty, under our names."""
    return any(not is_empty(row.get(name)) for pair in MEDIA_COLUMNS.items() for name in pair)


def refuse_media(row: Fields, turns: Sequence[Turn]) -> None:
    """Raise DataError for media in turns that cannot hold any: those after the prompt of a pair."""
    kinds = [found for column, found in MEDIA_COLUMNS.items() if row.get(column) is not None]
    for turn in turns:
        if turn.message.media or any(tag[1] in kinds for tag in _TAG.finditer(turn.message.content)):
            raise DataError(f"{turn.location} holds media; in a pair only the prompt can")


def _files(row: Fields, column: str) -> _Files:
    value, name = row.get(column), row.named(column)
    if is_empty(value):
        return _Files(name, [], False)
    if isinstance(value, str) and value.lstrip().startswith("["):  # in a CSV file
        value = as_json(value, name)
    if isinstance(value, list):
        return _Files(name, [_reference(item, f"{name}[{i}]") for i, item in enumerate(value)], False)
    return _Files(name, [_reference(value, name)], True)


def _attached(turn: Turn, columns: Mapping[MediaKind, _Files]) -> Message:
    """Return the message with its tags and its parts without a file replaced by files of the columns."""
    message = turn.message
    tags = [(tag.start(), tag) for tag in _TAG.finditer(message.content) if tag[1] in columns] if columns else []
    if not tags and not message.media:
        return message
    if message.role == "assistant":
        raise DataError(f"{turn.location} is of the assistant and holds media; a model reads them and writes none")
    found_at = sorted([*((part.offset, part) for part in message.media), *tags], key=lambda pair: pair[0])
    content, media, at = "", [], 0
    for offset, found in found_at:
        content += message.content[at:offset]
        at = offset if isinstance(found, MediaPart) else found.end()
        of_kind = found.kind if isinstance(found, MediaPart) else cast(MediaKind, found[1])
        given = found.reference if isinstance(found, MediaPart) else ""
        media.append(MediaPart(of_kind, given or _next(turn, of_kind, columns), len(content)))
    return replace(message, content=content + message.content[at:], media=tuple(media))


def _next(turn: Turn, of_kind: MediaKind, columns: Mapping[MediaKind, _Files]) -> str | bytes:
    files = columns.get(of_kind)
    if files is None or files.used == len(files.files):
        held = "the row has no column of such files" if files is None else f"{files.name} has {len(files.files)}"
        number = 1 if files is None else files.used + 1
        raise DataError(f"{turn.location}: {of_kind} {number} of the row has no file: {held}")
    files.used += 1
    return files.files[files.used - 1]


def file_name_column(values: Mapping[str, Any], file: str) -> dict[str, str]:
    """Return our column of the file that a row of a metadata file describes, and the row's name of it.

    file: with the row; empty if unknown.
    Raises: DataError if the name of the described file does not say its kind.
    """
    name = values.get(_FILE_NAME)
    if is_empty(name) or Path(file).name.split(".")[0] != METADATA:
        return {}
    suffix = Path(as_text(name, _FILE_NAME)).suffix.lower()
    if column := next((column for column, known in _SUFFIXES.items() if suffix in known), None):
        return {column: _FILE_NAME}
    known = sorted(chain.from_iterable(_SUFFIXES.values()))
    raise DataError(f"{_FILE_NAME} must end in one of {', '.join(known)}, found {suffix or 'no such end'!r}")


def located(chat: Conversation, file: str) -> Conversation:
    """Return the conversation with absolute paths; those in a row are relative to the folder of its file."""
    if not any(message.media for message in chat.messages):
        return chat
    folder = Path(file).parent

    def absolute(reference: str | bytes) -> str | bytes:
        if isinstance(reference, str):
            reference = reference.removeprefix("file://")
        if isinstance(reference, bytes) or _ADDRESS.match(reference):
            return reference
        return os.path.abspath(folder / os.path.expanduser(reference))

    def each(message: Message) -> Message:
        media = tuple(replace(part, reference=absolute(part.reference)) for part in message.media)
        return replace(message, media=media)

    return replace(chat, messages=tuple(map(each, chat.messages)))
