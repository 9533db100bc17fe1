"""Cores, threads and memory that this process may use, within the limits of its containers."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from finetune.system.errors import InputError

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_PROCESSOR = Path("/proc/cpuinfo")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Return the number of physical cores of this process, at most its CPU quota rounded up.

    Two hyperthreads of one core count once: they share its multipliers.
    """
    quota = cpu_quota()
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
        siblings = (_read(_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus)
        cores = len(set(siblings))
    else:
        cores = os.cpu_count() or 1
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def pick_threads(environ: Mapping[str, str], cores: int) -> int | None:
    """Return the threads of one process's CPU computation; None keeps the user's OMP_NUM_THREADS.

    Launchers set OMP_NUM_THREADS: `accelerate launch` and torchrun to 1 for several processes, `accelerate launch
    --cpu` to the cores of the host. So under a launcher 1 is ignored, and a larger value is an upper limit.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & environ.keys()
    given = environ.get("OMP_NUM_THREADS", "").split(",")[0]
    share = max(1, cores // ranks_here(environ))
    if not given.isdecimal():
        return share
    if not launched:
        return None
    return share if int(given) <= 1 else min(share, int(given))


def use_all_cores(device_type: str) -> str | None:
    """Set the CPU threads of this rank and return a log line; None on another device.

    Launchers give a rank one thread, and torch gives a container all threads of its host.
    """
    if device_type != "cpu":
        return None
    import torch

    cores, ranks = usable_cores(), ranks_here(os.environ)
    threads = pick_threads(os.environ, cores)
    if threads is None:
        return f"threads: per_rank={torch.get_num_threads()} (OMP_NUM_THREADS)"
    torch.set_num_threads(threads)
    return f"threads: per_rank={threads}, usable_cores={cores}, ranks_on_this_machine={ranks}"


def ranks_here(environ: Mapping[str, str]) -> int:
    """Return the number of processes of the run on this machine; raise InputError for an invalid LOCAL_WORLD_SIZE."""
    return _count(environ, "LOCAL_WORLD_SIZE")


def ranks_of_run(environ: Mapping[str, str]) -> int:
    """Return the number of processes of the run on all machines; raise InputError for an invalid WORLD_SIZE."""
    return _count(environ, "WORLD_SIZE")


def nodes_of_run(environ: Mapping[str, str]) -> int:
    """Return the number of machines of the run, with as many processes each as this one."""
    return max(1, ranks_of_run(environ) // ranks_here(environ))


def _count(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "1").strip()
    if not value.isdecimal() or int(value) == 0:
        raise InputError(f"{name}={value}: must be a positive integer\nhelp: unset the variable, or set {name}=2")
    return int(value)


def has_bf16_products() -> bool:
    """Return whether torch has fast bfloat16 products for this CPU (as ops/matmul.py), without importing torch."""
    lines = (line.partition(":") for line in _read(_PROCESSOR).splitlines())
    # x86 lists "flags", ARM "Features".
    flags = set(next((words.split() for name, _, words in lines if name.strip() in ("flags", "Features")), []))
    return not flags or flags >= {"avx512bw", "avx512vl", "avx512dq"} or bool(flags & {"avx_ne_convert", "bf16"})


def processor_name() -> str:
    """Return the name of the CPU, or of its architecture if the system has no name for it."""
    named = (line.partition(":")[2].strip() for line in _read(_PROCESSOR).splitlines() if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def cpu_quota() -> float | None:
    """Return the CPU quota of the process's control groups, in CPUs; None without a limit."""
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
    """Return the bytes of main memory that can be allocated without swapping or breaking a limit."""
    limits = (_free_in(group) for group in _groups("memory"))
    return min([psutil.virtual_memory().available, *(free for free in limits if free is not None)])


def resident_memory() -> int:
    """Return the bytes of main memory that this process holds now."""
    return psutil.Process().memory_info().rss


def malloc_trim() -> None:
    """Return free heap memory to the operating system; do nothing if the C library is not glibc."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _free_in(group: Path) -> int | None:
    """Return the bytes that a memory limit leaves; inactive file pages count as free."""
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
    """Yield the folders of the process's control group for a controller, and of all its parents.

    In a container the kernel's path may begin outside of the mount; then only the top folder is found.
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


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
