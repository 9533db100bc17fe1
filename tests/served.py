"""Run `finetune serve` in this process, ask it, and stop it by SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.commands import Done, run_here


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def serve_here(*words: str, ask: Callable[[httpx.Client], None], cwd: Path) -> Done:
    """Call `ask` when the server has printed its address, then end it; errors of `ask` are raised here."""
    port, ended, errors = free_port(), threading.Event(), []

    def client() -> None:
        while not (b"address:" in _printed() or ended.wait(0.05)):
            pass
        if ended.is_set():
            return
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=100, trust_env=False) as http:
                ask(http)
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            errors.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=client)
    asking.start()
    try:
        done = run_here("serve", *words, f"port={port}", cwd=cwd)
    finally:
        ended.set()
        asking.join()
    if errors:
        raise errors[0]
    return done


def _printed() -> bytes:
    """Return what a command in this process has printed so far."""
    return getattr(sys.stdout.buffer, "getvalue", bytes)()


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait, for a minute at most."""
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("waited in vain")
