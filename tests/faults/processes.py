"""Run a command of finetune to be killed: in forks of a process that has imported the package, or as a user does.

A process of its own costs 5 to 15 s of imports. A fork is killed at a chosen place: Python's audit hooks report every
change of a folder before it happens.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from tests.commands import ROOT, run_here

_PRELOAD = (
    "finetune.training.recipe",
    "finetune.distill.filling",
    "finetune.export.export",
    "finetune.export.safetensors_folder",
    "finetune.export.gguf.model",
    "finetune.objectives.reference_cache",
    "peft",
    "transformers.models.qwen2.modeling_qwen2",
)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(list(_PRELOAD))
# Audit event -> operation. Python reports each before it happens; `open` counts only where a file is written.
_OPERATIONS = {
    "open": "open",
    "os.mkdir": "mkdir",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "rmdir",
    "tests.fsync": "fsync",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# How a process ends that was killed here: by kill -9, or by the system at a byte of a file.
KILLED = {-signal.SIGKILL, -signal.SIGXFSZ}


@dataclass(frozen=True)
class Place:
    """A place of a kill: before the `call`-th `operation` on the folder, counted from 1.

    byte: not before the operation, but when a file is longer than this from there on.
    """

    operation: str
    call: int
    byte: int | None = None

    @property
    def name(self) -> str:
        return self.operation if self.byte is None else "write"


@dataclass(frozen=True)
class Watch:
    """What the first rank does at its operations on files of a folder.

    place: where it is killed. record: file that gets a line for each operation.
    """

    folder: Path
    place: Place | None = None
    record: Path | None = None


def start(words: Sequence[str], folder: Path, ranks: int = 1, watch: Watch | None = None) -> list[BaseProcess]:
    """Start `finetune WORDS…` in a folder, with its caches in it, as one process or as ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {"FINETUNE_CACHE": str(folder / "cache")}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        arguments = (list(words), folder, environment, watch if rank == 0 else None)
        processes.append(PROCESSES.Process(target=_run, args=arguments))
        processes[-1].start()
    return processes


def start_alone(words: Sequence[str], folder: Path, ranks: int = 1) -> psutil.Popen:
    """Start the same by the command line of a user, several ranks by torchrun; the output goes to `log_of(folder)`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    program = ["-m", "finetune", words[0]] if ranks == 1 else [*launcher, str(ROOT / "finetune" / "train.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FINETUNE_CACHE": str(folder / "cache")}
    with log_of(folder).open("ab") as log:
        return psutil.Popen([sys.executable, *program, *words[1:]], cwd=folder, env=environment, stdout=log, stderr=log)


def log_of(folder: Path) -> Path:
    """Return the file with the output of a command that failed in a folder."""
    return folder.with_name(f"{folder.name}.log")


def _run(words: list[str], folder: Path, environment: dict[str, str], watch: Watch | None) -> None:
    os.environ |= environment
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    from finetune.distill import shards
    from finetune.training import recipe

    recipe.try_report = lambda folder, log: None  # takes longer than the training
    shards._SHARD_BYTES = 30_000  # several files from a few rows
    if watch is not None:
        if watch.record is not None:
            stream = watch.record.open("a", buffering=1)
            _observe(watch.folder, lambda operation: stream.write(f"{operation}\n"))
        if watch.place is not None:
            _observe(watch.folder, _killing(watch.place))
    done = run_here(*words, cwd=folder)
    if done.returncode:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log_of(folder).write_text(done.stdout + done.stderr)
    os._exit(done.returncode)


def _killing(place: Place) -> Callable[[str], Any]:
    calls: Counter[str] = Counter()

    def reach(operation: str) -> None:
        calls[operation] += 1
        if operation == place.operation and calls[operation] == place.call:
            if place.byte is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (place.byte, resource.RLIM_INFINITY))

    return reach


def _observe(folder: Path, reach: Callable[[str], Any]) -> None:
    """Call `reach` with the name of each operation on files of the folder, before it happens."""
    fsync, prefix = os.fsync, f"{folder}{os.sep}"

    def audited_fsync(descriptor: int) -> None:
        sys.audit("tests.fsync", f"/proc/self/fd/{descriptor}")
        fsync(descriptor)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or (event == "open" and not arguments[2] & _WRITES):
            return
        path = arguments[0]
        if isinstance(path, int):
            path = f"/proc/self/fd/{path}"
        path = os.path.realpath(os.fsdecode(path)) if event == "tests.fsync" else os.path.abspath(os.fsdecode(path))
        # shutil.rmtree names files by the descriptor of their folder: they count as files of the current one.
        if path.startswith(prefix):
            reach(_OPERATIONS[event])

    os.fsync = audited_fsync
    sys.addaudithook(hook)
