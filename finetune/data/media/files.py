"""Find the file that a row names, and open it safely: it is never trusted.

Bytes, data URIs and downloads become files in the cache, under a hash, so that every reference ends as a path.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from finetune.data.media.audio import to_wav
from finetune.data.media.images import to_png
from finetune.data.media.media import MediaKind
from finetune.system.errors import DataError, os_errors_as
from finetune.system.format import format_bytes
from finetune.system.resources import cache_home

# Far above what a tower reads, and small enough to hold an image in memory.
MOST_BYTES: dict[MediaKind, int] = {"image": 256 * 10**6, "audio": 10**9, "video": 8 * 10**9}
# Embedded and downloaded content is held in memory while it is written.
_MOST_HELD_BYTES = 10**9
_DOWNLOAD_SECONDS = 60
_MOST_REDIRECTS = 5
_FILE_TYPES = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def shown(reference: object) -> str:
    """Return a short text that names a reference in messages."""
    if isinstance(reference, Mapping):
        reference = next((reference[key] for key in ("path", "url", "bytes", "data") if reference.get(key)), "{…}")
    if isinstance(reference, bytes):
        return f"of {len(reference)} bytes"
    text = str(reference) if isinstance(reference, str | Path) else type(reference).__name__
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= 120 else f"{text[:80]}… ({len(text)} characters)"


@contextmanager
def opened(path: str, kind: MediaKind) -> Iterator[io.FileIO]:
    """Open a regular file that is neither empty nor too large; a pipe or a device is refused without waiting.

    Raises: DataError.
    """
    with os_errors_as(DataError, "cannot be read"):
        try:
            _check_type(os.stat(path))
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DataError(f"does not exist, looked for {path}; correct the path, or add the file") from error
        except ValueError as error:  # a NUL character
            raise DataError(f"is not the name of a file ({error}); correct the path") from error
    with io.FileIO(descriptor) as file:
        status = os.fstat(descriptor)
        _check_type(status)
        if status.st_size == 0:
            raise DataError("is empty (0 bytes); replace the file")
        _check_size(status.st_size, MOST_BYTES[kind])
        yield file


def digest_of(file: io.FileIO) -> bytes:
    """Return the SHA-256 of an open file, and go back to its start."""
    digest = hashlib.file_digest(file, "sha256").digest()
    file.seek(0)
    return digest


def _check_type(status: os.stat_result) -> None:
    for is_type, name in _FILE_TYPES.items():
        if is_type(status.st_mode):
            raise DataError(f"is {name}; name a regular file")


def _check_size(size_bytes: int, most_bytes: int) -> None:
    if size_bytes > most_bytes:
        raise DataError(f"has {format_bytes(size_bytes)}, the limit is {format_bytes(most_bytes)}; save it smaller")


@dataclass(frozen=True, slots=True)
class Finder:
    """Find files of rows. allow_urls: whether http addresses are downloaded."""

    allow_urls: bool = False

    def find(self, reference: Any, folder: Path) -> str:
        """Return the absolute path of a reference's file; an embedded one is written into the cache first.

        Args:
            reference: a path, a file:// or http address, a data URI, bytes, or a mapping as hub datasets and OpenAI's
                messages hold it: `bytes` (or base64 in `data`), `array` with `sampling_rate`, `path` or `url`. An
                image of Pillow, too.
            folder: where relative paths start.

        Raises:
            DataError: nothing can be found or kept.
        """
        if isinstance(reference, Mapping):
            reference = _inner(reference)
        if type(reference).__module__.startswith("PIL."):
            reference = to_png(reference)
        if isinstance(reference, bytes | bytearray | memoryview):
            return _stored(bytes(reference))
        if not isinstance(reference, str | Path) or not str(reference).strip():
            raise DataError(f"is no reference, found {type(reference).__name__}; write a path, a data URI or bytes")
        text = str(reference)
        scheme = text.partition(":")[0].lower() if ":" in text else ""
        if scheme == "data":
            return _stored(_data_uri(text))
        if scheme in ("http", "https"):
            return self._downloaded(text)
        if scheme == "file":
            text = _file_uri(text)
        elif "://" in text:
            raise DataError(f"has the unsupported scheme {scheme}://; copy the file here, and write its path")
        with os_errors_as(DataError, "cannot be found"):
            return os.path.abspath(folder / os.path.expanduser(text))

    def _downloaded(self, url: str) -> str:
        if not self.allow_urls:
            raise DataError("is a URL, and nothing is downloaded; set data.allow_urls=true, or save the file here")
        target = cache_home("media") / "urls" / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        if not target.exists():
            _write(target, _download(url))
        return str(target.absolute())


def _inner(reference: Mapping[str, Any]) -> Any:
    """Return the content or the path in a mapping."""
    if reference.get("bytes") is not None:
        return reference["bytes"]
    if isinstance(data := reference.get("data"), str):
        return _base64(data)
    if reference.get("array") is not None:
        return to_wav(reference["array"], reference.get("sampling_rate") or 0)
    for key in ("path", "url"):
        if reference.get(key):
            return reference[key]
    raise DataError(f"names no file, found the keys {', '.join(map(str, reference)) or 'none'}; write path or bytes")


def _file_uri(text: str) -> str:
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise DataError(f"is not an address ({error}); write a path") from error
    if parts.netloc not in ("", "localhost"):
        raise DataError(f"names a file on the machine {parts.netloc!r}; write file:/// and an absolute path")
    return unquote(parts.path)


def _data_uri(text: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma:
        raise DataError("is a data URI without a comma before its content; write data:image/png;base64,…")
    return _base64(body) if head.lower().endswith(";base64") else unquote_to_bytes(body)


def _base64(text: str) -> bytes:
    _check_size(len(text) * 3 // 4, _MOST_HELD_BYTES)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"holds no valid base64 ({error}); encode the whole file again") from error


def _stored(content: bytes) -> str:
    path = cache_home("media") / "files" / hashlib.sha256(content).hexdigest()
    if not path.exists() or path.stat().st_size != len(content):
        _write(path, content)
    return str(path.absolute())


def _write(path: Path, content: bytes) -> None:
    """Write a file by one rename; several processes may write the same one."""
    if not content:
        raise DataError("is empty (0 bytes); embed the file's content, or remove it")
    _check_size(len(content), _MOST_HELD_BYTES)
    with os_errors_as(DataError, f"cannot be kept in {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _download(url: str) -> bytes:
    import httpx

    deadline = time.monotonic() + _DOWNLOAD_SECONDS
    content = bytearray()
    try:
        with (
            httpx.Client(follow_redirects=True, max_redirects=_MOST_REDIRECTS, timeout=10) as client,
            client.stream("GET", url) as response,
        ):
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                _check_size(len(content), _MOST_HELD_BYTES)
                if time.monotonic() > deadline:
                    raise DataError(f"takes more than {_DOWNLOAD_SECONDS} s to download; save the file here")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise DataError(f"cannot be downloaded ({error}); correct the URL, or save the file here") from error
    return bytes(content)
