"""What this process may use of its machine: cores and memory, under the limits of the containers that it runs in."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from finetune.system.errors import InputError

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_PROCESSOR = Path("/proc/cpuinfo")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Physical cores that this process may run on, and no more than its CPU quota is worth, rounded up.

    Two hyperthreads of a core count once: they share its multipliers.
    """
    quota = cpu_quota()
    cores = _physical_cores()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def pick_threads(environ: Mapping[str, str], cores: int) -> int | None:
    """Threads for one rank's CPU computation; None to leave them as the user set them.

    A launcher sets OMP_NUM_THREADS itself: `accelerate launch` and torchrun to 1 for several ranks, `accelerate launch
    --cpu` to the host's cores, whatever the container's quota. So under a launcher 1 means nothing, and more is a
    ceiling. (OMP_NUM_THREADS=1 set by hand cannot be told from the launcher's.)
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & environ.keys()
    asked = environ.get("OMP_NUM_THREADS", "").split(",")[0]
    share = max(1, cores // ranks_here(environ))
    if not asked.isdecimal():
        return share
    if not launched:
        return None
    return share if int(asked) <= 1 else min(share, int(asked))


def ranks_here(environ: Mapping[str, str]) -> int:
    """Ranks of the run on this machine. Raises: InputError if what a launcher says is no number."""
    return _count(environ, "LOCAL_WORLD_SIZE")


def ranks_of_run(environ: Mapping[str, str]) -> int:
    """Ranks of the run on all machines. Raises: InputError if what a launcher says is no number."""
    return _count(environ, "WORLD_SIZE")


def _count(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "1").strip()
    if not value.isdecimal() or int(value) == 0:
        raise InputError(f"{name}={value} in the environment is no number of ranks; unset it, or write {name}=2")
    return int(value)


def has_bf16_products() -> bool:
    """Whether torch has a library for this processor's bf16 products, as ops/products.py asks it; without torch."""
    flags = next((line for line in _read(_PROCESSOR).splitlines() if line.startswith("flags")), "").split()
    return not flags or {"avx512bw", "avx512vl", "avx512dq"} <= set(flags) or "avx_ne_convert" in flags


def device_type_here() -> str:
    """cuda where the kernel has a GPU that this process may see, else cpu; without torch, which takes seconds."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    found = any(True for pattern in ("nvidia[0-9]*", "dxg", "kfd") for _ in Path("/dev").glob(pattern))
    return "cuda" if found and not hidden else "cpu"


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A GPU as its driver knows it."""

    name: str
    total_bytes: int
    free_bytes: int


def device_memory() -> DeviceMemory | None:
    """The first GPU that this process may see, asked of nvidia-smi: no library is loaded, no context made."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]:
        command.append(f"--id={chosen}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        name, total, free = (word.strip() for word in done.stdout.splitlines()[0].rsplit(",", 2))
        return DeviceMemory(name, int(total) * 2**20, int(free) * 2**20)
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def cpu_quota() -> float | None:
    """CPUs' worth of time that the process's control groups grant it; None without a limit."""
    quotas = []
    for folder in _groups("cpu"):
        if words := _read(folder / "cpu.max").split():  # version 2: "max 100000" or "150000 100000"
            quota, period = words[0], words[-1]
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def available_memory() -> int:
    """Bytes of main memory that could be allocated now without swapping or breaking a limit; None if unknown."""
    limits = (_free_in(group) for group in _groups("memory"))
    return min([psutil.virtual_memory().available, *(free for free in limits if free is not None)])


def resident_memory() -> int:
    """Return the bytes of main memory that this process holds now."""
    return psutil.Process().memory_info().rss


def _free_in(group: Path) -> int | None:
    """What a memory limit leaves; pages of files that nobody used lately give way, so they count as free."""
    for limit_name, used_name, idle_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _read(group / limit_name), _read(group / used_name)
        if limit.isdecimal() and used.isdecimal():
            idle = next((s.split()[1] for s in _read(group / "memory.stat").splitlines() if s.startswith(idle_name)), 0)
            return max(0, int(limit) - max(0, int(used) - int(idle)))
    return None


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the process's control group for a controller and of all groups around it, whose limits hold too.

    Inside a container the path that the kernel tells may begin outside of what is mounted: then only the top is found.
    """
    for line in _read(_MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in [_CGROUPS / controllers, _CGROUPS / controller] if controllers else [_CGROUPS]:
            if mount.is_dir():
                inner = mount / path.lstrip("/")
                yield from (folder for folder in [inner, *inner.parents] if folder.is_relative_to(mount))
                break


def _physical_cores() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    return len({_read(_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus})


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
