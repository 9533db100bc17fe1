"""`finetune cache` and training from the cache, as real commands in fresh processes."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from tests.commands import Done, run_here
from tests.runs import metrics, result

GIVEN = (
    "config=quickstart.yaml",
    "distill.objective=recover",
    "distill.cache_kind=hidden",
    "distill.divergence=jsd",
    "data.train.0.limit=48",
    "data.eval.0.limit=8",
    "data.max_length=128",
    "train.batch_size=8",
    "train.max_steps=2",
    "generation.num_examples=0",
)


def finetune(command: str, folder: Path, *words: str) -> Done:
    return run_here(command, *words, cwd=folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, Done]:
    """A working directory with the cache `its signal`, and the output of `finetune cache`."""
    folder = tmp_path_factory.mktemp("work")
    done = finetune("cache", folder, *GIVEN, "distill.cache=its signal", "output_dir=an adapter")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_the_printed_command_trains_as_with_the_teacher_itself(written):
    folder, done = written
    summary, following = done.stdout.splitlines()
    assert summary.startswith("its signal: 56 documents written now, ")
    assert following.startswith("next: finetune train ")
    assert "56 of 56 documents" in done.stderr
    words = shlex.split(following.removeprefix("next: finetune train "))
    trained = finetune("train", folder, *words)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert result(folder / "an adapter")["status"] == "finished"
    online = finetune("train", folder, *GIVEN, "output_dir=online")
    assert online.returncode == 0, online.stderr[-3000:]
    for a, b in zip(metrics(folder / "an adapter"), metrics(folder / "online"), strict=True):
        # Equal bits on the machines that were tried. Elsewhere a batch of another shape may round a state of bf16
        # to its neighbor, which is 2^-8 of it away.
        assert (a["step"], a["target_tokens"]) == (b["step"], b["target_tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=2**-8)


def test_a_second_run_writes_nothing_and_more_rows_add_only_themselves(written, tmp_path):
    shutil.copytree(written[0] / "its signal", tmp_path / "copy")
    before = {file.name: file.read_bytes() for file in (tmp_path / "copy").glob("shard-*")}
    again = finetune("cache", tmp_path, *GIVEN, "distill.cache=copy")
    assert again.returncode == 0 and again.stdout.startswith("copy: 0 documents written now, ")
    assert "to_write" not in again.stderr
    more = finetune("cache", tmp_path, *GIVEN, "distill.cache=copy", "data.train.0.limit=60")
    assert more.returncode == 0 and more.stdout.startswith("copy: 12 documents written now, ")
    assert "12 of 68 documents" in more.stderr
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in before} == before


def test_a_cache_that_does_not_fit_the_run_is_refused_with_a_reason(written, tmp_path):
    shutil.copytree(written[0] / "its signal", tmp_path / "copy")
    cached = ("distill.cache=copy", "distill.teacher.placement=cached", f"output_dir={tmp_path / 'run'}")

    lacking = finetune("train", tmp_path, *GIVEN, *cached, "data.train.0.limit=60")
    assert lacking.returncode == 2 and "copy lacks 12 of 68 documents" in lacking.stderr

    with FileLock(tmp_path / "copy" / ".lock"):
        locked = finetune("cache", tmp_path, *GIVEN, "distill.cache=copy")
    assert locked.returncode == 2 and "another process is writing to copy" in locked.stderr

    [shard] = (tmp_path / "copy").glob("shard-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    damaged = finetune("train", tmp_path, *GIVEN, *cached)
    assert (
        damaged.returncode == 3 and f"error: distill.cache: {shard.relative_to(tmp_path)} is corrupt" in damaged.stderr
    )
