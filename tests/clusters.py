"""Stand-ins of what starts ranks on several machines: Slurm's commands, and a Python that notes torchrun's options.

A "machine" is a process of this one, so several rendezvous at 127.0.0.1.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, get_args_parser

ROOT = Path(__file__).resolve().parents[1]

# Every node runs the command that follows srun's options. The list of processes is what scancel signals.
_SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
running=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURMD_NODENAME=127.0.0.1 "$@" &
  running+=($!)
done
echo "${running[@]}" >"$CLUSTER/running"
code=0
for process in "${running[@]}"; do wait "$process" || code=$?; done
exit "$code"
"""
_SCANCEL = """#!/usr/bin/env bash
[[ $* == "--signal=TERM $SLURM_JOB_ID" ]] && kill -TERM $(<"$CLUSTER/running")
"""
_SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" >>"$CLUSTER/requeued" ;;
esac
"""
# Notes the options and variables of torchrun; runs everything else.
_PYTHON = """#!/usr/bin/env bash
if [[ $2 != torch.distributed.run ]]; then exec {python} "$@"; fi
exec {python} -S - "$@" <<'END'
import json, os, pathlib, sys
pet = {{name: value for name, value in os.environ.items() if name.startswith("PET_")}}
note = json.dumps([sys.argv[3:], pet])
pathlib.Path({folder!r}, f"note-{{os.getpid()}}").write_text(note)
END
"""


def make_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def note_taking_python(folder: Path) -> dict[str, str]:
    """Make a Python that starts no ranks, and return the variable that lets the launchers use it."""
    program = make_program(folder / "python", _PYTHON.format(python=sys.executable, folder=str(folder)))
    return {"FINETUNE_PYTHON": str(program)}


def noted_launches(folder: Path) -> list[tuple[LaunchConfig, list[str]]]:
    """Return what torchrun understood on each machine: its settings, and the command of a rank."""
    notes = [json.loads(file.read_text()) for file in folder.glob("note-*")]
    return [understood(arguments, variables) for arguments, variables in notes]


def understood(arguments: list[str], variables: dict[str, str]) -> tuple[LaunchConfig, list[str]]:
    """Return the settings that torchrun reads from its options and PET_ variables, and the command of a rank."""
    before = dict(os.environ)
    try:
        os.environ.update(variables)
        config, _, command = config_from_args(get_args_parser().parse_args(arguments))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return config, command


def slurm_job(folder: Path, nodes: int) -> dict[str, str]:
    """Make Slurm's commands in a folder, and return the variables of a job on `nodes` nodes with a rank each."""
    for name, text in (("srun", _SRUN), ("scancel", _SCANCEL), ("scontrol", _SCONTROL)):
        make_program(folder / name, text)
    return {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "CLUSTER": str(folder),
        "SLURM_JOB_ID": str(free_port(range(20_000, 30_000)) - 20_000),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
        "SLURM_GPUS_ON_NODE": "1",
    }


def free_port(ports: range) -> int:
    """Return a port of a range that nobody listens on, another one for each process of tests."""
    for port in ports[os.getpid() % len(ports) :]:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port in {ports}")


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start a launcher with the environment of this process and these variables."""
    environment = {**os.environ, "FINETUNE_PYTHON": sys.executable, **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(*machines: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for all machines, and return what they printed."""
    printed = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [code] * len(machines), "\n".join(printed)
    return "\n".join(printed)
