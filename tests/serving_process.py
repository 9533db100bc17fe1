"""A replica of `finetune serve` with a scripted engine, as a process: `python -m tests.serving_process port=N …`.

The engine repeats the prompt, a token each `seconds`. All else is what the command runs: HTTP, queue, cache, drain.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from tests.servers import wait_until

ROOT = Path(__file__).resolve().parent.parent


def main(words: list[str]) -> None:
    """Serve until a signal. words: port=, seconds= and settings of `serve` by their names."""
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer imports torch

    from finetune.config.command_options import ServeOptions, ServeSettings
    from finetune.data.template.chat import ChatTemplate
    from finetune.serving.server import _serve, listen
    from finetune.serving.service import ServedModel, Service
    from tests.serving_engine import ScriptedEngine

    options = dict(word.split("=", 1) for word in words)
    port, seconds = int(options.pop("port")), float(options.pop("seconds", 0))
    settings = ServeSettings.model_validate_strings(options)
    chat = ChatTemplate(PreTrainedTokenizerFast.from_pretrained(ROOT / "data" / "tiny-qwen2.5"))

    async def run() -> None:
        service = Service(ScriptedEngine(seconds=seconds), chat, [ServedModel("base", None, "b" * 64, 1)], settings)
        with listen("127.0.0.1", port) as listening:
            await _serve(service, ServeOptions(serve=settings), listening, None, lambda: None)

    asyncio.run(run())


class Replica:
    """A replica at a port that it keeps over restarts."""

    def __init__(self, port: int, **options: object):
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._words = [f"port={port}", *(f"{name}={value}" for name, value in options.items())]
        self.start()

    def start(self) -> None:
        """Start the process; it is not ready yet."""
        command = [sys.executable, "-m", "tests.serving_process", *self._words]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ})

    def wait_ready(self) -> None:
        """Return when the replica answers requests."""
        wait_until(self._ready, self.process)

    def kill(self) -> None:
        """End the process at once, as a lost machine does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask the process to end, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


if __name__ == "__main__":
    main(sys.argv[1:])
