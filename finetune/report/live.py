"""Serve the report of a run on this machine, drawn again while the run goes on."""

from __future__ import annotations

import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from finetune.report.run import METRICS, read_run
from finetune.report.run_page import render
from finetune.system.errors import FinetuneError


class LivePage:
    """The page of a run, drawn when a request finds new metrics."""

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, threading.Lock()
        self._drawn: tuple[tuple[float, ...], bytes, bool] | None = None

    def get(self) -> tuple[bytes, bool]:
        """Return the page in UTF-8, and whether the run may still change it.

        Raises: InputError if the folder holds no run.
        """
        with self._lock:
            files = (self._folder / METRICS, self._folder / "result.json", self._folder / "gap.json")
            stamp = tuple(file.stat().st_mtime for file in files if file.exists())
            if self._drawn is None or self._drawn[0] != stamp:
                run = read_run(self._folder)
                self._drawn = stamp, render(run).encode(), run.status == "unfinished"
            return self._drawn[1:]


def build_server(folder: Path, port: int, seconds: int) -> ThreadingHTTPServer:
    """Build a server of the page on the loopback address; browsers load it again every `seconds` while the run goes on.

    Raises:
        InputError: the folder holds no run.
        OSError: the port is taken.
    """
    page = LivePage(folder)
    page.get()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                content, unfinished = page.get()
            except (FinetuneError, OSError) as error:  # The next request may find the folder again.
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            if unfinished:
                self.send_header("Refresh", str(seconds))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Log no requests."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)
