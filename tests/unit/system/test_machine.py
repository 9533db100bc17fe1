"""Threads and memory respect the limits of the container; launchers leave no core idle; free memory is returned."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.system import machine
from finetune.system.errors import InputError

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({}, 8),
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OMP_NUM_THREADS": "3,2"}, None),
        ({**LAUNCHED, "OMP_NUM_THREADS": "1"}, 8),
        ({**LAUNCHED, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 4),
        ({**LAUNCHED, "OMP_NUM_THREADS": "64", "LOCAL_WORLD_SIZE": "2"}, 4),
        ({**LAUNCHED, "OMP_NUM_THREADS": "3"}, 3),
        ({"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 4),
        ({"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1"}, 8),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
    ],
)
def test_ranks_share_the_cores_unless_the_user_sets_the_threads(environ, threads):
    assert machine.pick_threads(environ, cores=8) == threads


@pytest.mark.parametrize("count", [machine.ranks_here, machine.ranks_of_run])
def test_the_number_of_ranks_comes_from_the_launcher(count):
    name = "WORLD_SIZE" if count is machine.ranks_of_run else "LOCAL_WORLD_SIZE"
    assert count({}) == 1 and count({name: "3"}) == 3
    for nonsense in ("0", "-1", "two", ""):
        with pytest.raises(InputError, match=f"{name}="):
            count({name: nonsense})


class Host:
    """A made-up /proc and /sys."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        for name, place in (
            ("_CGROUPS", "cgroup"),
            ("_MEMBERSHIP", "membership"),
            ("_TOPOLOGY", "cpu"),
        ):
            monkeypatch.setattr(machine, name, folder / place)
        self.free_bytes = 8000 * 1024
        monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=self.free_bytes))

    def write(self, file: str, text: object) -> None:
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / file).write_text(f"{text}\n")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return Host(tmp_path, monkeypatch)


def test_without_limits_the_whole_host_is_usable(host: Host):
    assert (machine.usable_cores(), machine.available_memory()) == (8, 8000 * 1024)


def test_two_hyperthreads_are_one_core(host: Host):
    for cpu in range(8):
        host.write(f"cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}")
    assert machine.usable_cores() == 4


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("150000 100000", 2), ("400000 100000", 4), ("5000 100000", 1)]
)
def test_a_quota_of_version_2_in_any_group_around_the_process_counts(host: Host, quota: str, cores: int):
    host.write("membership", "0::/pod/box")
    host.write("cgroup/pod/box/cpu.max", "max 100000")
    host.write("cgroup/pod/cpu.max", quota)
    assert machine.usable_cores() == cores


def test_a_quota_of_version_1_is_found_if_the_path_is_a_path_of_the_host(host: Host):
    host.write("membership", "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/")
    host.write("cgroup/cpu,cpuacct/cpu.cfs_quota_us", 300000)
    host.write("cgroup/cpu,cpuacct/cpu.cfs_period_us", 100000)
    host.write("cgroup/memory/memory.limit_in_bytes", 5_000_000)
    host.write("cgroup/memory/memory.usage_in_bytes", 3_000_000)
    host.write("cgroup/memory/memory.stat", "inactive_file 7\ntotal_inactive_file 1000000")
    assert (machine.usable_cores(), machine.available_memory()) == (3, 3_000_000)


def test_no_quota_of_version_1_is_minus_one(host: Host):
    host.write("membership", "3:cpu:/")
    host.write("cgroup/cpu/cpu.cfs_quota_us", -1)
    host.write("cgroup/cpu/cpu.cfs_period_us", 100000)
    assert machine.usable_cores() == 8


def test_a_memory_limit_of_version_2_counts_unless_the_host_has_less(host: Host):
    host.write("membership", "0::/box")
    host.write("cgroup/box/memory.max", "max")
    host.write("cgroup/box/memory.current", 100)
    assert machine.available_memory() == 8000 * 1024
    host.write("cgroup/box/memory.max", 2**20)
    assert machine.available_memory() == 2**20 - 100
    host.write("cgroup/box/memory.max", 2**40)
    assert machine.available_memory() == 8000 * 1024


def test_a_process_holds_the_memory_that_it_writes():
    before = machine.resident_memory()
    content = bytearray(b"x" * 50_000_000)
    assert machine.resident_memory() - before > 0.9 * len(content)


FRESH = """
import torch
from finetune.system.machine import use_all_cores
print(use_all_cores("cpu"), "|", torch.get_num_threads(), use_all_cores("cuda"))
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fresh_process_under_a_launcher_takes_its_share(ranks: int):
    environ = {**os.environ, **LAUNCHED, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(ranks)}
    done = subprocess.run([sys.executable, "-c", FRESH], env=environ, capture_output=True, text=True, check=True)
    share = max(1, machine.usable_cores() // ranks)
    said, counted = done.stdout.split("|")
    assert said.startswith(f"threads: per_rank={share},") and counted.split() == [str(share), "None"]


def test_bf16_products_are_detected_as_by_torch():
    import torch

    from finetune.ops.matmul import uses_fp32_matmul

    assert machine.has_bf16_products() is not uses_fp32_matmul(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("flags\t: avx2 fma\n", False),
        ("flags\t: avx512bw avx512vl avx512dq\n", True),
        ("Features\t: fp asimd asimddp\n", False),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("", True),
    ],
)
def test_bf16_products_of_x86_and_of_arm(tmp_path: Path, monkeypatch, cpuinfo: str, found: bool):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{cpuinfo}")
    monkeypatch.setattr(machine, "_PROCESSOR", tmp_path / "cpuinfo")
    assert machine.has_bf16_products() is found


HOLES = """
import os
from pathlib import Path
from finetune.system.machine import malloc_trim

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

blocks = [bytearray(b"x" * 60_000) for _ in range(2000)]
full, blocks[:-1] = resident_bytes(), []  # the last of them keeps the heap as long as it was
freed = resident_bytes()
malloc_trim()
print(full - freed, freed - resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc_trim")
def test_free_memory_below_a_used_block_returns_to_the_system(repo_root):
    done = subprocess.run([sys.executable, "-c", HOLES], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_freeing, by_giving_back = map(int, done.stdout.split())
    assert by_freeing < 12_000_000 and by_giving_back > 100_000_000


def test_another_c_library_gets_no_other_call(monkeypatch):
    class Library:
        def __init__(self, name: str | None):
            self.asked: list[str] = []
            libraries.append(self)

        def __getattr__(self, name: str) -> object:
            self.asked.append(name)
            raise AttributeError(name)

    libraries: list[Library] = []
    monkeypatch.setattr(machine.ctypes, "CDLL", Library)
    machine.malloc_trim()
    assert [library.asked for library in libraries] == [["malloc_trim"]]
