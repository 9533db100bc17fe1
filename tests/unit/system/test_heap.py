"""What the heap holds free goes back to the system, where the C library can do that."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from finetune.system import heap

HOLES = """
import os
from pathlib import Path
from finetune.system.heap import malloc_trim

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

blocks = [bytearray(b"x" * 60_000) for _ in range(2000)]
full, blocks[:-1] = resident_bytes(), []  # the last of them keeps the heap as long as it was
freed = resident_bytes()
malloc_trim()
print(full - freed, freed - resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc_trim")
def test_what_lies_below_a_living_block_is_given_back(repo_root):
    done = subprocess.run([sys.executable, "-c", HOLES], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_freeing, by_giving_back = map(int, done.stdout.split())
    assert by_freeing < 12_000_000 and by_giving_back > 100_000_000


def test_of_another_c_library_nothing_else_is_asked(monkeypatch):
    class Library:
        def __init__(self, name: str | None):
            self.asked: list[str] = []
            libraries.append(self)

        def __getattr__(self, name: str) -> object:
            self.asked.append(name)
            raise AttributeError(name)

    libraries: list[Library] = []
    monkeypatch.setattr(heap.ctypes, "CDLL", Library)
    heap.malloc_trim()
    assert [library.asked for library in libraries] == [["malloc_trim"]]
