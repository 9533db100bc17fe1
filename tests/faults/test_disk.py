"""A checkpoint, a cache and a record on a disk whose n-th operation fails, for every n."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from finetune.system.errors import FinetuneError, ResourceError, os_errors_as
from tests.faults import disk

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def test_a_failing_disk_leaves_the_old_state_or_the_new_one():
    figures = disk.run(names=("checkpoint", "quantized cache", "sweep.json"), count=6)
    assert figures["lost"] == 0, figures["examples"]
    assert figures["failed"] > 40


def case(folder: Path, save) -> disk.Case:
    return disk.Case("x", folder, save, lambda: (folder / "a").read_bytes() if (folder / "a").exists() else None)


def test_a_save_that_is_not_one_rename_loses_cases(tmp_path: Path):
    states = disk_digests(None, b"whole")
    torn = case(tmp_path, lambda: None)
    (tmp_path / "a").write_bytes(b"who")
    error = ResourceError(f"{tmp_path}: full")
    assert "neither the old nor the new" in str(disk.judge(torn, "full", error, "", states))
    (tmp_path / "a").unlink()
    assert disk.judge(torn, "full", error, "", states) is None
    assert "exit code 4" in str(disk.judge(torn, "I/O error", error, "", states))
    assert "not named" in str(disk.judge(torn, "full", ResourceError("full"), "", states))
    assert "another error" in str(disk.judge(torn, "full", OSError(errno.ENOSPC, "x"), "", states))
    assert "without a word" in str(disk.judge(torn, "full", None, "", states))


def disk_digests(*contents: object) -> tuple[str, str]:
    from tests.faults.damage import digest

    old, new = map(digest, contents)
    return old, new


@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "full"), RuntimeError("No space left on device (os error 28)")])
def test_a_full_disk_is_exit_code_4_in_every_language(kind: Exception):
    with pytest.raises(ResourceError, match="out=a: the disk is full"), os_errors_as(FinetuneError, "out=a"):
        raise kind
    with pytest.raises(FinetuneError, match="out=a: Input/output error") as found, os_errors_as(FinetuneError, "out=a"):
        raise RuntimeError("I/O error (os error 5)")
    assert found.value.exit_code == 1
