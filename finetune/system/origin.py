"""Where a result comes from: the command line, the commit of the user's files, and the hardware."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.system.accelerator import default_device, device_name, on_gpu
from finetune.system.console import in_notebook
from finetune.system.machine import processor_name, usable_cores

_GIT_SECONDS = 5.0


def command_line(words: Sequence[str]) -> str | None:
    """Return the words of a process (sys.argv) as a line for a shell, without the folder of the program.

    None in a notebook, whose words are those of its kernel.
    """
    if in_notebook() or not words:
        return None
    program = Path(words[0]).name
    return shlex.join(["finetune" if program == "__main__.py" else program, *words[1:]])


def git_commit(folder: Path) -> str | None:
    """Return the commit of a folder, with `-dirty` if tracked files differ; None without a repository or git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        # Without the lock, git does not write into the repository.
        environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True, env=environ)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def hardware(device_type: str) -> dict[str, Any]:
    """Return the names of CPU and GPU, the usable cores, and the threads of torch in this process."""
    import torch

    gpu = {"gpu": device_name(default_device())} if on_gpu(device_type) else {}
    return {"cpu": processor_name(), **gpu, "cores": usable_cores(), "threads": torch.get_num_threads()}
