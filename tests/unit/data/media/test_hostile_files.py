"""References and files that nothing must wait for, follow or hold in memory: each is refused with its reason."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.media import files
from finetune.data.media.files import Finder
from finetune.system.errors import DataError
from tests.unit.data.media.samples import audio_file, image_file, picture, processor, tone

PNG = image_file(picture(40, 60))


def written(folder: Path, content: bytes, name: str = "image.png") -> str:
    (folder / name).write_bytes(content)
    return name


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.png")
    return "pipe.png"


def unix_socket(folder: Path) -> str:
    here = os.open(".", os.O_RDONLY)
    os.chdir(folder)  # a socket's path has at most 107 bytes
    socket.socket(socket.AF_UNIX).bind("socket.png")
    os.fchdir(here)
    os.close(here)
    return "socket.png"


def loop(folder: Path) -> str:
    (folder / "a.png").symlink_to("b.png")
    (folder / "b.png").symlink_to("a.png")
    return "a.png"


def dangling(folder: Path) -> str:
    (folder / "link.png").symlink_to("nowhere.png")
    return "link.png"


def sparse(folder: Path) -> str:
    with (folder / "large.png").open("wb") as file:
        file.truncate(files.MOST_BYTES["image"] + 1)
    return "large.png"


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: "cat.png", "does not exist"),
    "missing-folder": (lambda folder: "photos/cat.png", "does not exist"),
    "file-as-folder": (lambda folder: written(folder, PNG) + "/cat.png", "cannot be read"),
    "folder": (lambda folder: ".", "a folder"),
    "pipe": (pipe, "a pipe"),
    "device-without-end": (lambda folder: "/dev/zero", "a device"),
    "terminal": (lambda folder: "/dev/ptmx", "a device"),
    "kernel-file-of-size-zero": (lambda folder: "/proc/self/status", "is empty"),
    "socket": (unix_socket, "a socket"),
    "loop-of-links": (loop, "symbolic links"),
    "dangling-link": (dangling, "does not exist"),
    "empty-file": (lambda folder: written(folder, b""), "is empty"),
    "too-large": (sparse, "the limit is"),
    "name-with-nul": (lambda folder: "cat\0.png", "not the name of a file"),
    "name-too-long": (lambda folder: "x" * 5000, "name too long"),
    "name-with-half-a-surrogate": (lambda folder: "\ud800.png", "not the name of a file"),
    "empty-name": (lambda folder: "", "no reference"),
    "blank-name": (lambda folder: "  \n", "no reference"),
    "nothing": (lambda folder: None, "no reference"),
    "number": (lambda folder: 7, "no reference"),
    "list": (lambda folder: ["a.png"], "no reference"),
    "empty-mapping": (lambda folder: {}, "names no file"),
    "mapping-of-nulls": (lambda folder: {"bytes": None, "path": None}, "names no file"),
    "mapping-in-a-mapping": (lambda folder: {"path": {"path": "a.png"}}, "no reference"),
    "no-bytes": (lambda folder: b"", "is empty"),
    "bytes-as-text": (lambda folder: {"bytes": str(PNG)}, "does not exist|too long|cannot be"),
    "scheme-of-a-cloud": (lambda folder: "s3://bucket/cat.png", "unsupported scheme s3"),
    "scheme-of-ffmpeg": (lambda folder: "concat:a.mp4|b.mp4", "does not exist"),
    "url-without-permission": (lambda folder: "https://localhost/cat.png", "data.allow_urls"),
    "file-of-another-machine": (lambda folder: "file://server/cat.png", "machine"),
    "broken-file-address": (lambda folder: "file://[/cat.png", "not an address"),
    "data-uri-without-comma": (lambda folder: "data:image/png;base64", "comma"),
    "data-uri-empty": (lambda folder: "data:image/png;base64,", "is empty"),
    "data-uri-not-base64": (lambda folder: "data:image/png;base64,@@@@", "base64"),
    "data-uri-cut-off": (lambda folder: "data:;base64," + base64.b64encode(PNG).decode()[:-3], "base64"),
    "base64-not-ascii": (lambda folder: {"data": "äöü", "format": "wav"}, "base64"),
    "array-without-rate": (lambda folder: {"array": tone(0.1)}, "cannot be a WAV"),
    "array-of-three-axes": (lambda folder: {"array": np.zeros((2, 2, 2)), "sampling_rate": 16000}, "expected"),
    "array-of-complex-numbers": (lambda folder: {"array": np.zeros(9, complex), "sampling_rate": 16000}, "expected"),
    "array-of-texts": (lambda folder: {"array": ["a"], "sampling_rate": 16000}, "expected"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_reference_that_cannot_be_used_is_refused_with_its_reason(name: str, tmp_path: Path):
    make, reason = HOSTILE[name]
    with pytest.raises(DataError, match=reason) as caught:
        processor().measure("image", make(tmp_path), tmp_path)
    message = str(caught.value)
    assert message.startswith("image ") and message.isprintable() and len(message) < 900


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(tmp_path, PNG)

    def refuse(*_: Any) -> int:  # root may read every file
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        processor().measure("image", "image.png", tmp_path)


def test_a_file_replaced_by_a_pipe_after_the_first_look_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    regular = os.stat(tmp_path / written(tmp_path, PNG))
    pipe(tmp_path)
    monkeypatch.setattr(files.os, "stat", lambda *_: regular)
    with pytest.raises(DataError, match="a pipe"):
        processor().measure("image", "pipe.png", tmp_path)


def test_a_kind_that_the_model_does_not_read_is_refused():
    with pytest.raises(DataError, match=r"Qwen2\.5-VL, which reads image, video"):
        processor("qwen2_5_vl").measure("audio", audio_file(tone(1)))
    with pytest.raises(DataError, match="text only"):
        processor("qwen2").measure("image", PNG)


def test_all_forms_of_a_file_are_one_file(tmp_path: Path, cache: Path):
    ours, name = processor(), written(tmp_path, PNG, "a picture.png")
    encoded = base64.b64encode(PNG).decode()
    forms = [name, tmp_path / name, str(tmp_path / name), f"file://{tmp_path}/a%20picture.png", {"path": name}]
    forms += [PNG, bytearray(PNG), f"data:image/png;base64,{encoded}", {"bytes": PNG, "path": "lost.png"}]
    forms += [{"url": f"DATA:;BASE64,{encoded}"}, {"data": encoded, "format": "png"}, {"url": name, "detail": "low"}]
    measured = [ours.measure("image", form, tmp_path) for form in forms]
    assert len({media.digest for media in measured}) == 1
    assert all(Path(media.path).is_absolute() and Path(media.path).read_bytes() == PNG for media in measured)
    assert len(list(cache.rglob("*"))) == 2  # the folder `files`, and one file


def test_a_damaged_file_of_the_cache_is_written_again(cache: Path):
    path = Path(processor().measure("image", PNG).path)
    path.write_bytes(PNG[:50])
    assert Path(processor().measure("image", PNG).path).read_bytes() == PNG


def test_a_file_that_changes_after_it_is_measured_is_refused(tmp_path: Path):
    ours = processor()
    media = ours.measure("image", written(tmp_path, PNG), tmp_path)
    written(tmp_path, image_file(picture(60, 40)))
    with pytest.raises(DataError, match="changed"):
        ours.pixels(media)
    assert processor(image={"max_pixels": 4000}).measure("image", PNG).digest != ours.measure("image", PNG).digest


class Server(BaseHTTPRequestHandler):
    """/image.png has one; the other paths misbehave."""

    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        routes = {"/image.png": self.image, "/loop": lambda: self.to("/loop"), "/local": lambda: self.to("file:///etc")}
        routes |= {"/empty": lambda: self.body(b""), "/endless": self.endless, "/short": self.short}
        routes.get(self.path, lambda: self.send_error(404))()

    def image(self) -> None:
        self.body(PNG)

    def endless(self) -> None:
        self.body(b"")
        with contextlib.suppress(OSError):  # the client leaves
            while True:
                self.wfile.write(bytes(10_000))

    def short(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(PNG[:100])

    def to(self, address: str) -> None:
        self.send_response(302)
        self.send_header("Location", address)
        self.end_headers()

    def body(self, content: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    Server.requests = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_a_url_is_downloaded_once(server: str):
    ours = processor(allow_urls=True)
    first, again = (ours.measure("image", f"{server}/image.png") for _ in range(2))
    assert first == again and Path(first.path).read_bytes() == PNG
    assert Server.requests == 1


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("path", "reason"),
    [("/none", "404"), ("/loop", "redirect"), ("/local", "cannot be downloaded"), ("/empty", "is empty")]
    + [("/endless", "the limit is"), ("/short", "cannot be downloaded")],
)
def test_a_url_that_misbehaves_is_refused_and_not_kept(
    server: str, cache: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
):
    monkeypatch.setattr(files, "_MOST_HELD_BYTES", 10**5)
    with pytest.raises(DataError, match=reason):
        processor(allow_urls=True).measure("image", server + path)
    assert not [file for file in cache.rglob("*") if file.is_file()]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "http://", "http://[/a.png", "http://a\x00b/"])
def test_a_url_that_leads_nowhere_is_refused(url: str):
    with pytest.raises(DataError, match="cannot be downloaded"):
        processor(allow_urls=True).measure("image", url)


def test_a_slow_server_is_given_up(server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_DOWNLOAD_SECONDS", -1)
    with pytest.raises(DataError, match="to download"):
        Finder(allow_urls=True).find(f"{server}/endless", Path())
