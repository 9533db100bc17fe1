"""Run `finetune ARGUMENTS…` in this process, or in one of its own, and return what it left."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
Done = subprocess.CompletedProcess[str]


def run_here(*arguments: str, cwd: Path, input: str = "", encoding: str = "utf-8") -> Done:
    """Run a command in this process: a process of its own costs 5 to 15 s of imports."""
    from finetune.cli import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    streams = mock.patch.multiple(
        sys, stdin=io.TextIOWrapper(io.BytesIO(input.encode(encoding)), encoding=encoding), stdout=out, stderr=err
    )
    with streams, contextlib.chdir(cwd):
        code = main(list(arguments))
    return Done(list(arguments), code, _text(out), _text(err))


def run_process(*arguments: str, cwd: Path, **options) -> Done:
    """Run a command in a fresh process: for kills, limits, environments and lazy imports."""
    command = [sys.executable, "-m", "finetune.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500, **options)


def train_on_ranks(ranks: int, *overrides: str, config: str = "quickstart.yaml") -> None:
    """Train in several processes, as torchrun starts them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *launcher, str(ROOT / "finetune" / "train.py"), f"config={config}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    content = stream.buffer
    assert isinstance(content, io.BytesIO)
    return content.getvalue().decode(stream.encoding)
