"""Real servers of other projects as processes of a test: Redis and nginx, if this machine has them."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def program(name: str, *folders: str) -> str:
    """Path of an installed program, or skip."""
    found = next(filter(None, [shutil.which(name), *(shutil.which(f"{folder}/{name}") for folder in folders)]), None)
    return found or pytest.skip(f"needs {name}, which this machine lacks")


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Wait for a condition, while a process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args} is not ready"
        time.sleep(0.02)


def listens(address: str | int) -> bool:
    """Whether somebody accepts connections at a unix socket or at a port of this machine."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        return client.connect_ex(address if isinstance(address, str) else ("127.0.0.1", address)) == 0


def free_port() -> int:
    """A port that nobody has now, for servers that cannot choose one and keep it over a restart."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class RedisServer:
    """Redis at a unix socket, without files. url: for serve.cache."""

    def __init__(self, folder: Path, *arguments: str):
        self._program = program("redis-server")
        self._socket = str(folder / "redis.sock")
        self._arguments = arguments
        self.url = f"unix://{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [self._program, "--port", "0", "--unixsocket", self._socket, "--save", "", *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: listens(self._socket), self._process)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            Path(self._socket).unlink(missing_ok=True)


class Nginx:
    """nginx in the foreground with the contents of a server block's file; it listens where that file says.

    address: the port or unix socket of it.
    """

    def __init__(self, folder: Path, site: str, address: str | int):
        self._program = program("nginx", "/usr/sbin")
        (folder / "site.conf").write_text(site)
        temporary = "".join(
            f"  {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off;\npid {folder}/nginx.pid;\nworker_processes 2;\nevents {{ worker_connections 1024; }}\n"
            f"http {{\n  access_log off;\n{temporary}  include {folder}/site.conf;\n}}\n"
        )
        self.log = folder / "error.log"
        command = [self._program, "-e", str(self.log), "-p", str(folder), "-c", str(folder / "nginx.conf")]
        self._process = subprocess.Popen(command)
        wait_until(lambda: listens(address), self._process)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
