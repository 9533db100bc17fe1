"""Kill, stop and cut off ranks: when do the others end, and do they name the rank and its host?"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults import Figures
from tests.faults.rank import RUNS
from tests.network import Host, two_hosts, why_no_hosts

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 120
SETTINGS = (
    "config=quickstart.yaml",
    "data.eval=[]",
    "data.max_length=64",
    "train.batch_size=2",
    "train.save_every=4",
    "generation.num_examples=0",
    "train.resume=auto",
)


@dataclass(frozen=True)
class Case:
    """One fault: which launcher started two ranks, which one it hits, and how.

    Attributes:
        launcher: `torchrun`, `bare` (two processes with torch's variables) or `hosts` (torchrun on each of two hosts).
        fault: a signal, or `cut`: the link between the hosts goes down for good.
    """

    launcher: str
    victim: int
    fault: str


CASES = (
    Case("torchrun", 1, "SIGKILL"),
    Case("bare", 0, "SIGKILL"),
    Case("bare", 1, "SIGKILL"),
    Case("torchrun", 1, "SIGSTOP"),
    Case("bare", 0, "SIGSTOP"),
    Case("hosts", 1, "cut"),
)


@dataclass
class Launch:
    """A running launch: its processes, the file of their output, and the hosts if there are two."""

    processes: list[subprocess.Popen[bytes]]
    output: Path
    hosts: tuple[Host, Host] | None = None

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes that train."""
        found = {}
        for process in self.processes:
            try:
                parent = psutil.Process(process.pid)
                for each in (parent, *parent.children(recursive=True)):
                    if "tests.faults.rank" in each.cmdline() and "torch.distributed.run" not in each.cmdline():
                        found[int(each.environ()["RANK"])] = each
            except psutil.Error:
                continue
        return found

    def wait(self) -> list[int]:
        """Wait for the processes that were started, and return their exit codes."""
        return [process.wait(timeout=400) for process in self.processes]


@contextmanager
def launch(
    launcher: str, settings: Sequence[str], folder: Path, *, timing: str = "", restarts: int = 0, rate_mbit: float = 0
) -> Iterator[Launch]:
    """Start two ranks that train into `folder`/run; kill what is left of them at the end.

    Args:
        settings: of the run; without any, the ranks only sum a number.
        timing: intervals of beats, as `beat=0.3,lost=4`; those of the package if empty.
        restarts: torchrun's --max-restarts.
        rate_mbit: of the link between two hosts, 0: no limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = ["-m", "tests.faults.rank", timing]
    if settings:
        words += [*settings, f"output_dir={folder / 'run'}", "train.world_size=2"]
    base = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    base |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={restarts}"]
    output = folder / "output"
    with output.open("wb") as stream:

        def start(command: list[str], **variables: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, cwd=ROOT, env=base | variables, stdout=stream, stderr=stream)

        if launcher == "torchrun":
            yield from _ended(Launch([start([*torchrun, "--standalone", "--nproc_per_node=2", *words])], output))
        elif launcher == "bare":
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = str(free.getsockname()[1])
            shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, *words]
            ranks = [start(command, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
            yield from _ended(Launch(ranks, output))
        else:
            with two_hosts(rate_mbit or None) as hosts:
                meet = [f"--rdzv-endpoint={hosts[0].address}:29500", "--rdzv-backend=c10d", "--rdzv-id=run"]
                torchrun += ["--nnodes=2", "--nproc_per_node=1", *meet]
                commands = [host.command(*torchrun, f"--local-addr={host.address}", *words) for host in hosts]
                yield from _ended(Launch([start(command) for command in commands], output, hosts))


def _ended(launched: Launch) -> Iterator[Launch]:
    try:
        yield launched
    finally:
        ranks = launched.ranks().values()
        for process in (*launched.processes, *ranks):
            process.kill()
        launched_ids = [process.wait() for process in launched.processes]
        psutil.wait_procs([rank for rank in ranks if rank.pid not in launched_ids], timeout=30)


def wait_until(holds: Callable[[], bool], launched: Launch, seconds: float = 300) -> None:
    """Wait for a condition. Raises RuntimeError with the output if the launch ends before, or too late."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline or all(process.poll() is not None for process in launched.processes):
            raise RuntimeError(launched.output.read_text(errors="replace")[-6000:])
        time.sleep(0.05)


def measure(case: Case, folder: Path, timing: str = "") -> tuple[float, str]:
    """Return after how many seconds the ranks that the fault did not hit had ended, and the output of all."""
    with launch(case.launcher, (), folder, timing=timing) as launched:
        wait_until(lambda: launched.output.read_text().count(RUNS) == 2, launched)
        time.sleep(2)  # Beats have been read.
        ranks = launched.ranks()
        victim = ranks.pop(case.victim)
        if case.fault == "cut":
            assert launched.hosts is not None
            launched.hosts[case.victim].set_link("down")
        else:
            victim.send_signal(getattr(signal, case.fault))
        began = time.monotonic()
        # Both sides of a cut end.
        others = [*ranks.values(), *([victim] if case.fault == "cut" else [])]
        while any(_runs(process) for process in others) and time.monotonic() - began < 2 * LIMIT_SECONDS:
            time.sleep(0.05)
        return time.monotonic() - began, launched.output.read_text(errors="replace")


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def names(output: str, case: Case) -> bool:
    """Return whether an error of ours names the rank that is lost and its host."""
    host = f"host-{'ab'[case.victim]}-" if case.launcher == "hosts" else socket.gethostname()
    return any(f"rank {case.victim} on {host}" in line for line in output.splitlines() if "error" in line)


def run(seed: int, count: int, minutes: float | None) -> Figures:
    """Measure each case once, in the order that the seed begins; with the intervals of the package."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    cases = [CASES[(seed + i) % len(CASES)] for i in range(count)]
    figures: Figures = {"cases": 0, "lost": 0}
    for case in cases:
        if deadline is not None and time.monotonic() > deadline:
            break
        if case.launcher == "hosts" and (reason := why_no_hosts()):
            figures["skipped"] = reason
            continue
        with tempfile.TemporaryDirectory() as folder:
            seconds, output = measure(case, Path(folder))
        figures["cases"] += 1
        figures["lost"] += int(seconds > LIMIT_SECONDS or not names(output, case))
        figures[f"{case.launcher} rank {case.victim} {case.fault} seconds"] = round(seconds, 1)
    return figures
