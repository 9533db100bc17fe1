"""A mapped tensor is the file's numbers, wherever in the file they begin, and costs no memory of the process's own."""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.models.safetensors_index import Stored, WeightFiles, map_tensor, save_tensors
from finetune.system.errors import IntegrityError


def written(file: Path, **tensors: torch.Tensor) -> dict[str, Stored]:
    save_file(tensors, file)
    return WeightFiles(dict.fromkeys(tensors, file)).tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (70, 97), (2, 3, 4)])
def test_a_mapped_tensor_equals_the_saved_one(dtype, shape, tmp_path):
    tensors = {name: torch.randn(shape).to(dtype) for name in "abc"}
    stored = written(tmp_path / "some.safetensors", **tensors)
    assert len({place.offset for place in stored.values()}) == 3
    for name, tensor in tensors.items():
        found = map_tensor(stored[name])
        assert found.dtype == dtype and found.shape == shape and found.is_contiguous() and torch.equal(found, tensor)


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 6, 8, 4096 - 6, 4096, 70_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tensor_may_begin_at_any_byte(shift, dtype, tmp_path):
    tensor, file = torch.randn(50, 64).to(dtype), tmp_path / "numbers"
    file.write_bytes(b"x" * shift + tensor.view(torch.uint8).numpy().tobytes() + b"x")
    assert torch.equal(map_tensor(Stored(file, shift, dtype, (50, 64))), tensor)


@pytest.mark.parametrize("kept", [0, 1, 4095, 4096, 5000])
def test_a_truncated_file_is_an_error_before_its_pages_are_read(kept, tmp_path):
    file = tmp_path / "some.safetensors"
    place = written(file, a=torch.randn(100, 100))["a"]
    with file.open("r+b") as stream:
        stream.truncate(place.offset + kept)
    with pytest.raises(IntegrityError, match=f"too short for its header, found {place.offset + kept:,} bytes"):
        map_tensor(place)
    assert map_tensor(replace(place, shape=(kept // 400, 100))).shape == (kept // 400, 100)


MAPPED = """
import sys
from pathlib import Path
import torch
from finetune.models.safetensors_index import WeightFiles, map_tensor

def memory():
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}
    return sizes["RssAnon"], sizes["RssFile"]

file = Path(sys.argv[1])
place = WeightFiles({"a": file}).tensors["a"]
torch.ones(9).sum(), map_tensor(place)
before = memory()
tensor = map_tensor(place)
tensor.sum()
during = memory()
del tensor
after = memory()
print(*(now - then for now, then in zip(during + after, before + before)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_tensor_uses_only_pages_of_its_file_and_frees_them(repo_root, tmp_path):
    place = written(tmp_path / "some.safetensors", a=torch.randn(4096, 4096))["a"]
    size = math.prod(place.shape) * 4
    command = [sys.executable, "-c", MAPPED, str(place.file)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    anonymous, mapped, anonymous_left, mapped_left = map(int, done.stdout.split())
    assert mapped >= size and anonymous < size / 8
    assert mapped_left < size / 8 and anonymous_left < size / 8
    # PyTorch warns of buffers that are not writable; nobody can act on that.
    assert "writable" not in done.stderr


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_written_file_has_the_mode_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(2))
