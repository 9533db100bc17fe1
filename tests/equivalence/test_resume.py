"""A run killed again and again, in the middle of a save too, ends in the same bits as one left alone."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import train
from finetune.errors import ConfigError
from finetune.training.checkpoint import list_checkpoints
from tests.equivalence.conftest import SMALL_RUN, adapter, metrics
from tests.equivalence.test_steps import assert_identical

KILLS, STEPS = 10, 40


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "finetune.cli", "train", "config=quickstart.yaml", *SMALL_RUN, f"train.max_steps={STEPS}",
        "train.save_every=1", "train.eval_every=10", "train.resume=auto", f"output_dir={folder}", *overrides,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], ready) -> bool:
    """Poll until `ready()`; False if the process ended first."""
    while process.poll() is None:
        if ready():
            return True
        time.sleep(0.0005)
    return False


def test_ten_kills_at_random_moments_leave_the_same_adapter_and_metrics(tmp_path):
    unbroken = start(tmp_path / "unbroken")
    assert unbroken.wait() == 0, unbroken.stderr.read()
    broken, rng, mid_save = tmp_path / "broken", random.Random(0), 0
    for kill in range(KILLS):
        process = start(broken)
        done = len(metrics(broken)) if (broken / "metrics.jsonl").exists() else 0
        steps = rng.randint(1, 3)
        assert wait_for(process, lambda: (broken / "metrics.jsonl").exists() and len(list_checkpoints(broken)) > 0)
        target = min(done + steps, STEPS - 1)
        assert wait_for(process, lambda: (broken / f"checkpoint-{target}").exists()), process.stderr.read()
        if kill % 2:
            assert wait_for(process, lambda: any(broken.glob(".incomplete-checkpoint-*"))), "no save was met"
        else:
            time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        mid_save += any(broken.glob(".incomplete-checkpoint-*"))
    last = start(broken)
    assert last.wait() == 0, last.stderr.read()
    assert mid_save > 0, "at least one kill must have hit a save"
    assert_identical(str(tmp_path / "unbroken"), str(broken))
    assert metrics(broken) == metrics(tmp_path / "unbroken")
    assert json.loads((broken / "result.json").read_text())["steps"] == STEPS


def test_a_torn_checkpoint_is_passed_over_and_the_end_is_the_same(small_run, capsys):
    whole, torn = small_run("whole", "train.save_every=1"), small_run("torn", "train.save_every=1")
    train(whole)
    train(torn)
    newest = Path(torn.output_dir) / "checkpoint-4"
    (newest / "training.safetensors").write_bytes(b"torn")
    again = small_run("torn", "train.save_every=1", "train.resume=auto")
    train(again)
    assert "checkpoint-4: training.safetensors has 4 bytes" in capsys.readouterr().err
    assert_identical(whole.output_dir, again.output_dir)
    assert metrics(whole.output_dir) == metrics(again.output_dir)


def test_a_run_may_be_lengthened_but_not_changed(small_run):
    cfg = small_run("run", "train.save_every=2")
    train(cfg)
    with pytest.raises(ConfigError) as refused:
        train(small_run("run", "train.resume=auto", "train.learning_rate=0.001", "lora.rank=4", "data.train.0.limit=50"))
    message = str(refused.value)
    assert all(part in message for part in ("train.learning_rate", "lora.rank: 8 then, 4 now", "data.train"))
    result = train(small_run("run", "train.resume=auto", "train.max_steps=6"))
    assert result.steps == 6
    assert [line["step"] for line in metrics(cfg.output_dir)] == [1, 2, 3, 4, 5, 6]


def test_an_existing_run_is_never_overwritten(small_run):
    cfg = small_run("run", "train.max_steps=1")
    train(cfg)
    before = adapter(cfg.output_dir)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(cfg)
    assert before.keys() == adapter(cfg.output_dir).keys()
    shutil.rmtree(cfg.output_dir)
    train(cfg)
