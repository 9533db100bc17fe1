"""A guarded run: warned, ended or brought back when it drifts too far from its base, and exact all the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune import train
from finetune.commands.cache import run as run_cache
from finetune.system.arguments import Arguments
from tests.runs import SMALL_RUN, differing, metrics, result, small_run

# Far from the base within two steps.
DRIFTING = (
    "data.train.0.limit=24",
    "data.eval.0.limit=8",
    "train.max_steps=6",
    "train.eval_every=2",
    "train.save_every=2",
    "train.keep_checkpoints=9",
    "train.learning_rate=2e-2",
    "train.schedule=constant",
    "train.warmup_ratio=0",
)
LIMIT = "guard.max=0.05"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guard")


@pytest.fixture(scope="module")
def recovering(folder: Path) -> tuple[str, ...]:
    """Settings of a run that recovers from a cached teacher, which `finetune cache` has written for it."""
    settings = (*DRIFTING, LIMIT, "guard.action=recover", "guard.steps=2", f"distill.cache={folder / 'signal'}")
    run_cache(Arguments("quickstart.yaml", (*SMALL_RUN, *settings), frozenset()))
    return (*settings, "distill.teacher.placement=cached")


@pytest.fixture(scope="module")
def warned(folder: Path) -> Path:
    train(small_run(folder / "warned", *DRIFTING, LIMIT))
    return folder / "warned"


@pytest.fixture(scope="module")
def recovered(folder: Path, recovering: tuple[str, ...]) -> Path:
    train(small_run(folder / "recovered", *recovering))
    return folder / "recovered"


def test_a_warning_names_step_distance_and_limit_and_changes_nothing(folder: Path, capsys: pytest.CaptureFixture):
    train(small_run(folder / "told", *DRIFTING, LIMIT))
    told = capsys.readouterr().err
    train(small_run(folder / "alone", *DRIFTING))
    first, *_ = result(folder / "told")["breaches"]
    distance = f"step 2: {first['teacher_kl']:.5f} nats a target from the teacher, above guard.max=0.05"
    assert f"WARNING: {distance}" in told
    assert differing(folder / "told", folder / "alone") == []
    assert result(folder / "alone")["breaches"] == []


def test_a_run_that_stays_within_the_limit_is_left_alone(folder: Path):
    train(small_run(folder / "within", *DRIFTING, "guard.max=100", "guard.action=stop"))
    assert (result(folder / "within")["breaches"], result(folder / "within")["steps"]) == ([], 6)


def test_a_recovery_brings_the_model_nearer_than_one_that_was_only_warned(warned: Path, recovered: Path):
    breaches = result(recovered)["breaches"]
    assert [breach["step"] for breach in breaches] == [2, 4, 6]
    assert all(breach["after"] < breach["teacher_kl"] for breach in breaches)
    assert result(recovered)["teacher_kl_after"] == breaches[-1]["after"]
    assert result(recovered)["teacher_kl_after"] < 0.5 * result(warned)["teacher_kl_after"]


def test_the_metrics_say_what_was_found_and_what_it_was_afterwards(recovered: Path):
    evaluated = [line for line in metrics(recovered) if "eval_loss" in line]
    for line, breach in zip(evaluated, result(recovered)["breaches"], strict=True):
        assert line["guard/teacher_kl_before"] == breach["teacher_kl"]
        assert line["eval/heldout/teacher_kl"] == breach["after"]


@pytest.mark.parametrize("step", [2, 4])
def test_a_guarded_run_that_was_killed_ends_in_the_same_bits(
    folder: Path, recovering: tuple[str, ...], recovered: Path, step: int
):
    again = folder / f"again-{step}"
    shutil.copytree(recovered / f"checkpoint-{step}", again / f"checkpoint-{step}")
    train(small_run(again, *recovering, "train.resume=auto"))
    assert differing(again, recovered) == []
    assert result(again)["breaches"] == result(recovered)["breaches"]


def test_stop_saves_what_there_is_and_ends_as_a_finished_run(folder: Path, warned: Path, capsys: pytest.CaptureFixture):
    train(small_run(folder / "stopped", *DRIFTING, LIMIT, "guard.action=stop"))
    told = capsys.readouterr()
    assert "the run ends here (guard.action=stop)" in told.err
    ended = result(folder / "stopped")
    assert (ended["status"], ended["steps"], len(ended["breaches"])) == ("finished", 2, 1)
    assert json.loads((folder / "stopped" / "checkpoint-2" / "state.json").read_text())["breaches"] == ended["breaches"]
    shutil.copytree(warned / "checkpoint-2", folder / "two" / "checkpoint-2")
    train(small_run(folder / "two", *DRIFTING, "train.max_steps=2", LIMIT, "train.resume=auto"))
    assert differing(folder / "stopped", folder / "two") == []


def test_a_limit_alone_asks_the_base_itself_in_16_bit(warned: Path):
    assert result(warned)["teacher_kl_before"] < 0.05 < result(warned)["teacher_kl_after"]
    assert "heldout" in (warned / "teacher.md").read_text()
