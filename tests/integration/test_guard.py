"""A guarded run is warned, ended or recovered beyond its limit, and stays reproducible."""

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
    """Settings of a run that recovers, with a teacher cached by `finetune cache`."""
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


def test_a_warning_names_step_kl_and_limit_and_changes_nothing(folder: Path, capsys: pytest.CaptureFixture):
    train(small_run(folder / "warned-again", *DRIFTING, LIMIT))
    log = capsys.readouterr().err
    train(small_run(folder / "alone", *DRIFTING))
    first, *_ = result(folder / "warned-again")["breaches"]
    assert f"WARNING: guard: step=2, teacher_kl={first['teacher_kl']:.5f}, max=0.05" in log
    assert differing(folder / "warned-again", folder / "alone") == []
    assert result(folder / "alone")["breaches"] == []


def test_a_run_within_the_limit_has_no_breaches(folder: Path):
    train(small_run(folder / "within", *DRIFTING, "guard.max=100", "guard.action=stop"))
    assert (result(folder / "within")["breaches"], result(folder / "within")["steps"]) == ([], 6)


def test_a_recovered_model_ends_nearer_to_its_base_than_a_warned_one(warned: Path, recovered: Path):
    breaches = result(recovered)["breaches"]
    assert [breach["step"] for breach in breaches] == [2, 4, 6]
    assert all(breach["after"] < breach["teacher_kl"] for breach in breaches)
    assert result(recovered)["teacher_kl_after"] == breaches[-1]["after"]
    assert result(recovered)["teacher_kl_after"] < 0.5 * result(warned)["teacher_kl_after"]


def test_the_metrics_hold_the_kl_before_and_after_a_recovery(recovered: Path):
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


def test_stop_saves_a_checkpoint_and_ends_as_a_finished_run(folder: Path, warned: Path, capsys: pytest.CaptureFixture):
    train(small_run(folder / "stopped", *DRIFTING, LIMIT, "guard.action=stop"))
    assert "guard.action=stop" in capsys.readouterr().err
    ended = result(folder / "stopped")
    assert (ended["status"], ended["steps"], len(ended["breaches"])) == ("finished", 2, 1)
    assert json.loads((folder / "stopped" / "checkpoint-2" / "state.json").read_text())["breaches"] == ended["breaches"]
    shutil.copytree(warned / "checkpoint-2", folder / "two" / "checkpoint-2")
    train(small_run(folder / "two", *DRIFTING, "train.max_steps=2", LIMIT, "train.resume=auto"))
    assert differing(folder / "stopped", folder / "two") == []


def test_with_a_limit_alone_the_teacher_is_the_16_bit_base(warned: Path):
    assert result(warned)["teacher_kl_before"] < 0.05 < result(warned)["teacher_kl_after"]
    assert "heldout" in (warned / "teacher.md").read_text()
