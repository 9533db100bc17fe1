"""Flower as processes of a test: a SuperLink, SuperNodes and `flwr run`, from an environment of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.servers import free_port, listens, wait_until

APP = Path(__file__).resolve().parents[1] / "launch" / "flower"
PIN = "flwr==1.42.0"


def programs() -> Path:
    """Folder of Flower's programs: of FINETUNE_FLOWER, or beside this environment; or skip."""
    folder = Path(os.environ.get("FINETUNE_FLOWER") or Path(sys.prefix) / "flower") / "bin"
    if not (folder / "flower-superlink").is_file():
        pytest.skip(f"needs Flower: python -m venv {folder.parent} && {folder}/pip install {PIN}")
    return folder


class Flower:
    """A SuperLink on a port of this machine, and SuperNodes by name; `stop` ends them all."""

    def __init__(self, folder: Path, **environment: str):
        self._programs, self._folder, self._port = programs(), folder, free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        home = folder / "flower-home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )
        self._environment = {
            **os.environ,
            "PATH": f"{self._programs}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            **environment,
        }

    def start_server(self) -> None:
        """Start the SuperLink, or start it again, and wait until it listens."""
        words = ["--insecure", "--host", "127.0.0.1", "--port", str(self._port)]
        words += ["--database", str(self._folder / "superlink.db"), "--disable-runtime-dependency-installation"]
        self._start("server", "flower-superlink", *words)
        wait_until(lambda: listens(self._port), self._processes["server"])

    def start_party(self, name: str, **config: object) -> None:
        """Start a SuperNode with this --node-config."""
        words = " ".join(f'{key.replace("_", "-")}="{value}"' for key, value in {"name": name, **config}.items())
        address = ["--insecure", "--superlink", f"127.0.0.1:{self._port}", "--port", str(free_port())]
        self._start(name, "flower-supernode", *address, "--node-config", words)

    def run(self, **config: object) -> None:
        """Submit the app with these settings."""
        words = " ".join(
            f"{key.replace('_', '-')}={value}" if isinstance(value, int | float) else f'{key}="{value}"'
            for key, value in config.items()
        )
        command = [str(self._programs / "flwr"), "run", str(APP), "here", "--run-config", words]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self, name: str) -> None:
        """Kill a process with all that it started, as the system does."""
        process = self._processes.pop(name)
        with suppress(psutil.NoSuchProcess):
            # Flower starts the apps in sessions of their own.
            for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait()

    def stop(self) -> None:
        """Kill all processes."""
        for name in [*self._processes]:
            self.kill(name)

    def log_of(self, name: str) -> str:
        """Return the end of what a process printed."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def _start(self, name: str, program: str, *words: str) -> None:
        with open(self._folder / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(
                [str(self._programs / program), *words],
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,
            )
