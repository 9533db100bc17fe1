"""With the threads that a run takes by itself, beside programs that keep every core busy, the bits stay the same."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.training.checkpoint import list_checkpoints
from tests.runs import differing, metrics

STEPS, KILLS, SEQUENCES = 12, 2, 8


def spin() -> None:
    while True:
        pass


@pytest.fixture
def busy_cores():
    """Keep every core busy with another process."""
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for process in processes:
        process.start()
    yield
    for process in processes:
        process.kill()


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start the quickstart, whose rows share a beginning, with all cores and without the tests' limit of threads."""
    words = ["train", "config=quickstart.yaml", f"output_dir={folder}", f"train.max_steps={STEPS}"]
    words += ["train.save_every=2", "train.resume=auto", f"train.batch_size={SEQUENCES}", "data.eval=[]"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    return subprocess.Popen(
        [sys.executable, "-m", "finetune", *words, "generation.num_examples=0"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_killed_runs_on_a_busy_machine_end_in_the_bits_of_an_unbroken_one(tmp_path, busy_cores):
    unbroken, broken, rng = tmp_path / "unbroken", tmp_path / "broken", random.Random(0)
    assert start(unbroken).wait() == 0
    for kill in range(1, KILLS + 1):
        process = start(broken)
        while process.poll() is None and len(list_checkpoints(broken)) < kill:
            time.sleep(0.01)
        time.sleep(rng.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert start(broken).wait() == 0
    assert differing(unbroken, broken) == []
    assert metrics(unbroken) == metrics(broken)
