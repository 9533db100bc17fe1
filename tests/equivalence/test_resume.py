"""A run killed many times, also during a save, ends in the same bits as an unbroken one."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from finetune import train
from finetune.cli import main
from finetune.system.errors import ConfigError
from finetune.system.manifest import record_files
from finetune.system.resources import packaged
from finetune.training.checkpoint import STATE, list_checkpoints
from tests.faults.processes import PROCESSES
from tests.runs import REWARDED_RUN, SMALL_RUN, adapter, differing, metrics, reference_run, result, small_run

PLAIN = (*SMALL_RUN, "train.save_every=1", "train.eval_every=10")
# The answers of a round, on which two steps train, are sampled anew.
REWARDS = (*REWARDED_RUN, "reward.updates=2", "train.save_every=2", "train.eval_every=null")


SAMPLE = packaged("data") / "sample"
PAIRS = (
    *SMALL_RUN,
    f"data.train=[{{path: {SAMPLE / 'pairs.jsonl'}, limit: 32}}]",
    f"data.eval=[{{path: {SAMPLE / 'pairs-heldout.jsonl'}, limit: 4}}]",
    "data.max_length=256",
    "preference.objective=dpo",
    "train.learning_rate=2e-3",
    "train.save_every=1",
    "train.eval_every=3",
)


def start(folder: Path, steps: int, settings: Sequence[str]) -> BaseProcess:
    settings = (*settings, f"train.max_steps={steps}", "train.resume=auto", f"output_dir={folder}")
    process = PROCESSES.Process(target=main, args=(["train", "config=quickstart.yaml", *settings],))
    process.start()
    return process


def wait_until(process: BaseProcess, ready: Callable[[], bool]) -> None:
    """Poll until `ready()`; fails if the process ends first."""
    while not ready():
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.0005)


def saved_steps(folder: Path) -> int:
    return max((int(path.name.removeprefix("checkpoint-")) for path in list_checkpoints(folder)), default=0)


@pytest.mark.parametrize(
    ("kills", "steps", "settings"),
    [(2, 8, PLAIN), (10, 40, PLAIN), (2, 8, REWARDS)],
    ids=["2-8", "10-40", "rewards"],
)
def test_kills_at_random_moments_give_the_same_adapter_and_metrics(tmp_path, kills, steps, settings):
    check_kills(tmp_path, kills, steps, settings)


def test_a_killed_run_on_preferences_keeps_its_reference(tmp_path):
    """The reference is the adapter that training started from, not that of the checkpoint."""
    check_kills(tmp_path, 2, 6, (*PAIRS, f"lora.init_adapter={reference_run()}"))
    assert metrics(tmp_path / "broken")[-1]["eval/pairs-heldout/reference_kl"] > 0


def check_kills(tmp_path: Path, kills: int, steps: int, settings: Sequence[str]) -> None:
    start(tmp_path / "unbroken", steps, settings).join()
    broken, rng, mid_save = tmp_path / "broken", random.Random(0), 0
    for kill in range(kills):
        process = start(broken, steps, settings)
        goal = saved_steps(broken) + rng.randint(1, 3)
        wait_until(process, lambda goal=goal: saved_steps(broken) >= goal)
        if kill % 2:
            wait_until(process, lambda: any(broken.glob(".incomplete-checkpoint-*")))
        else:
            time.sleep(rng.random() * 0.2)
        process.kill()
        process.join()
        mid_save += any(broken.glob(".incomplete-checkpoint-*"))
    start(broken, steps, settings).join()
    assert mid_save > 0, "at least one kill must have hit a save"
    assert differing(tmp_path / "unbroken", broken) == []
    assert metrics(broken) == metrics(tmp_path / "unbroken")
    assert [result(tmp_path / name)["steps"] for name in ("unbroken", "broken")] == [steps, steps]


def test_a_corrupt_checkpoint_is_skipped_and_the_result_is_the_same(tmp_path, capsys):
    valid, corrupt = reference_run("train.save_every=1"), tmp_path / "corrupt"
    shutil.copytree(valid, corrupt)
    (corrupt / "checkpoint-4" / "training.safetensors").write_bytes(b"bits")
    train(small_run(corrupt, "train.save_every=1", "train.resume=auto"))
    assert "checkpoint-4: training.safetensors has 4 bytes" in capsys.readouterr().err
    assert differing(valid, corrupt) == []
    assert metrics(valid) == metrics(corrupt)


def test_a_run_killed_after_its_last_save_leaves_no_old_checkpoints(tmp_path):
    finished, killed = reference_run("train.save_every=1"), tmp_path / "killed"
    shutil.copytree(finished, killed)
    shutil.copytree(killed / "checkpoint-3", killed / "checkpoint-2")
    shutil.copytree(killed / "checkpoint-3", killed / ".incomplete-checkpoint-1")
    train(small_run(killed, "train.save_every=1", "train.resume=auto"))
    assert {path.name for path in killed.glob("*checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_a_run_may_be_lengthened_but_not_changed(tmp_path):
    train(small_run(tmp_path, "train.save_every=2"))
    changes = ("train.learning_rate=0.001", "lora.rank=4", "data.train.0.limit=50")
    with pytest.raises(ConfigError) as refused:
        train(small_run(tmp_path, "train.resume=auto", *changes))
    assert all(part in str(refused.value) for part in ("train.learning_rate", "lora.rank: 8 then, 4 now", "data.train"))
    assert train(small_run(tmp_path, "train.resume=auto", "train.max_steps=6")).steps == 6
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_with_8_bit_moments_and_lora_plus_equals_an_unbroken_one(tmp_path):
    words = ("train.optimizer=paged_adamw_8bit", "train.lora_plus_ratio=4", "train.schedule=wsd", "lora.rank=32")
    train(small_run(tmp_path / "unbroken", *words))
    train(small_run(tmp_path / "resumed", *words, "train.save_every=2"))
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    assert train(small_run(tmp_path / "resumed", *words, "train.save_every=2", "train.resume=auto")).steps == 4
    assert differing(tmp_path / "unbroken", tmp_path / "resumed") == []
    assert metrics(tmp_path / "unbroken") == metrics(tmp_path / "resumed")


def test_a_checkpoint_of_a_version_with_fewer_settings_is_continued(tmp_path):
    train(small_run(tmp_path, "train.save_every=2", "train.max_steps=2"))
    folder = tmp_path / "checkpoint-2"
    state = json.loads((folder / STATE).read_text())
    for key in ("train.optimizer", "train.lora_plus_ratio", "train.min_lr_ratio"):
        del state["trajectory"][key]
    (folder / STATE).write_text(json.dumps(state))
    record_files(folder, [STATE])
    with pytest.raises(ConfigError, match=r"train\.optimizer"):
        train(small_run(tmp_path, "train.resume=auto", "train.optimizer=adamw_8bit"))
    assert train(small_run(tmp_path, "train.resume=auto", "train.max_steps=3")).steps == 3


def test_an_existing_run_is_never_overwritten(tmp_path):
    train(small_run(tmp_path, "train.max_steps=1"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="already holds a run"):
        train(small_run(tmp_path, "train.max_steps=2"))
    assert {path: path.read_bytes() for path in before} == before


def test_early_stopping_ends_the_run_with_the_best_adapter(tmp_path):
    """At this learning rate the loss rises later. The best checkpoint is kept and gives the final adapter."""
    settings = (
        "train.max_steps=60",
        "train.eval_every=2",
        "train.early_stopping=2",
        "train.keep_checkpoints=1",
        "train.schedule=constant",
    )
    outcome = train(small_run(tmp_path, *settings, "train.learning_rate=0.3", "train.max_grad_norm=0"))
    evaluations = {line["step"]: line["eval_loss"] for line in metrics(tmp_path) if "eval_loss" in line}
    best = min(evaluations, key=evaluations.__getitem__)
    assert outcome.steps == max(evaluations) == best + 4 < 60
    assert outcome.eval_loss == evaluations[best]
    kept = {folder.name for folder in list_checkpoints(tmp_path)}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{outcome.steps}"}
    best_tensors = adapter(tmp_path / f"checkpoint-{best}")
    assert all(torch.equal(tensor, best_tensors[name]) for name, tensor in adapter(tmp_path).items())


def test_a_run_with_pauses_equals_an_unbroken_one(tmp_path):
    words, paused = ("lora.rank=4", "data.eval.0.limit=8"), tmp_path / "paused"
    train(small_run(tmp_path / "unbroken", *words))
    losses = []
    for step in (1, 3, 3):  # the same command again does nothing
        done = train(small_run(paused, *words, f"train.pause_at={step}", "train.resume=auto"))
        assert (done.status, done.steps, done.adapter) == ("paused", step, None)
        losses.append(done.eval_loss)
    assert None not in losses and losses[0] != losses[1] == losses[2]
    assert train(small_run(paused, *words, "train.resume=auto")).status == "finished"
    assert differing(tmp_path / "unbroken", paused) == []
    assert metrics(tmp_path / "unbroken") == metrics(paused)
