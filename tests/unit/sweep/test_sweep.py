"""The sweep command, with a stub in place of training."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from finetune.cli import main
from finetune.sweep.record import RECORD
from tests.html_reader import Reader

STUB = f"sweep.launch={shlex.join([sys.executable, str(Path(__file__).parent / 'stub.py')])}"
GRID = ("train.learning_rate=1e-3,2e-3", "lora.rank=4,8")
SEARCH = ("train.learning_rate=tag(log,interval(1e-4,1e-2))", "lora.rank=4,8,16")


def sweep(folder: Path, *words: str) -> int:
    return main(["sweep", "config=quickstart.yaml", f"sweep.out={folder}", STUB, *words])


def record(folder: Path) -> dict:
    return json.loads((folder / RECORD).read_text())


def trials(folder: Path) -> list[tuple]:
    return [(*trial["values"].values(), trial["status"], trial["metric"]) for trial in record(folder)["trials"]]


def started(folder: Path) -> list[str]:
    return (folder / "started.txt").read_text().split()


def faults(folder: Path, **of_trials: dict) -> None:
    folder.mkdir(exist_ok=True)
    named = {name.replace("_", "-"): fault for name, fault in of_trials.items()}
    (folder / "faults.json").write_text(json.dumps(named))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept") / "s"
    assert sweep(folder, *GRID) == 0
    return folder


@pytest.fixture
def finished(swept: Path, tmp_path: Path) -> Path:
    """Copy a finished sweep."""
    return shutil.copytree(swept, tmp_path / "s")


def test_a_grid_runs_in_order_and_ends_in_a_table_with_the_best_first(tmp_path: Path, capsys):
    assert sweep(tmp_path / "s", *GRID) == 0
    assert started(tmp_path / "s") == ["trial-001", "trial-002", "trial-003", "trial-004"]
    assert trials(tmp_path / "s") == [
        ("0.001", "4", "finished", 1.04),
        ("0.001", "8", "finished", 1.08),
        ("0.002", "4", "finished", 0.04),
        ("0.002", "8", "finished", 0.08),
    ]
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["trial-003", "trial-004", "trial-001", "trial-002"]
    assert (tmp_path / "s" / "sweep.md").read_text() == shown.out
    assert "run 3/4: train.learning_rate=0.002 lora.rank=4: finished, held-out loss=0.0400" in shown.err
    assert record(tmp_path / "s")["best"] == 3
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_effects_and_every_run(finished: Path):
    read = Reader((finished / "sweep.html").read_text())
    figures = [attrs["aria-label"] for tag, attrs, _ in read.elements if tag == "figure"]
    assert figures == ["train.learning_rate", "lora.rank", "Loss, nats per target token, training"]
    cells = read.texts("td")
    assert [cells[i] for i in range(0, len(cells), 7)] == ["trial-003", "trial-004", "trial-001", "trial-002"]


def test_the_same_command_again_runs_nothing(finished: Path):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("trial-*/*")}
    assert sweep(finished, *GRID) == 0
    assert len(started(finished)) == 4
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("trial-*/*")} == before


def test_another_metric_sorts_the_same_runs_anew(finished: Path):
    assert sweep(finished, *GRID, "sweep.metric=eval/heldout/accuracy", "sweep.direction=minimize") == 0
    assert len(started(finished)) == 4 and record(finished)["best"] == 2


def test_a_failed_run_is_reported_and_tried_again(tmp_path: Path, capsys):
    faults(tmp_path / "s", trial_002={"fail": "no memory"})
    assert sweep(tmp_path / "s", *GRID) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].startswith("| trial-002") and "failed: no memory" in shown.out
    assert "trial-002 failed: no memory\n  and a second line" in shown.err and "1 of 4 runs failed" in shown.err
    faults(tmp_path / "s")
    assert sweep(tmp_path / "s", *GRID) == 0
    assert started(tmp_path / "s")[4:] == ["trial-002"]
    assert trials(tmp_path / "s")[1] == ("0.001", "8", "finished", 1.08)


def test_a_sweep_in_which_every_run_fails_fails_with_each_error_once(tmp_path: Path, capsys):
    faults(tmp_path / "s", **{f"trial_00{i}": {"fail": "no memory"} for i in range(1, 5)})
    assert sweep(tmp_path / "s", *GRID) == 1
    assert capsys.readouterr().err.split("every run of the sweep failed:")[1].count("no memory") == 1


def test_a_nan_metric_is_never_the_best(tmp_path: Path, capsys):
    faults(tmp_path / "s", trial_003={"nan": True})
    assert sweep(tmp_path / "s", *GRID) == 0
    assert record(tmp_path / "s")["best"] == 4
    assert "eval_loss is nan" in capsys.readouterr().out.splitlines()[-1]


def test_an_unmeasured_metric_ends_the_sweep_after_the_first_run(tmp_path: Path, capsys):
    assert sweep(tmp_path / "s", *GRID, "sweep.metric=eval/other/accuracy") == 2
    error = capsys.readouterr().err
    assert "trial-001" in error and "eval_loss, final_loss, train_seconds, eval/heldout/accuracy" in error
    assert started(tmp_path / "s") == ["trial-001"]
    assert sweep(tmp_path / "s", *GRID, "sweep.metric=eval/heldout/accuracy") == 0
    assert started(tmp_path / "s") == ["trial-001", "trial-002", "trial-003", "trial-004"]


def test_the_metric_of_a_search_can_change_until_it_is_measured(tmp_path: Path, capsys):
    pytest.importorskip("optuna")
    words = (*SEARCH, "sweep.trials=2")
    assert sweep(tmp_path / "s", *words, "sweep.metric=eval/other/accuracy") == 2
    assert sweep(tmp_path / "s", *words) == 0
    assert sweep(tmp_path / "s", *words, "sweep.metric=final_loss") == 2
    assert "sweep.metric: eval_loss there, found final_loss" in capsys.readouterr().err


def test_a_longer_search_equals_an_uninterrupted_one(tmp_path: Path):
    pytest.importorskip("optuna")
    sweep(tmp_path / "parts", *SEARCH, "sweep.trials=3")
    sweep(tmp_path / "parts", *SEARCH, "sweep.trials=8")
    sweep(tmp_path / "whole", *SEARCH, "sweep.trials=8")
    assert trials(tmp_path / "parts") == trials(tmp_path / "whole")
    assert len(started(tmp_path / "parts")) == len(set(started(tmp_path / "parts")))
    assert sweep(tmp_path / "other", *SEARCH, "sweep.trials=3", "sweep.seed=1") == 0
    assert trials(tmp_path / "other") != trials(tmp_path / "whole")[:3]


def test_a_search_runs_equal_settings_once(tmp_path: Path, capsys):
    pytest.importorskip("optuna")
    assert sweep(tmp_path / "s", "lora.rank=4,8", "sweep.trials=5") == 0
    assert len(started(tmp_path / "s")) == 2
    assert "the same as run" in capsys.readouterr().err
    assert {metric for *_, metric in trials(tmp_path / "s")} == {1.04, 1.08}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_the_sweep_and_the_same_command_resumes(tmp_path: Path, number: int):
    folder = tmp_path / "s"
    faults(folder, trial_002={"seconds": 60})
    words = ["sweep", "config=quickstart.yaml", f"sweep.out={folder}", STUB, *GRID]
    command = [sys.executable, "-m", "finetune.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while "step 1" not in (folder / "trial-002.log").read_text() if (folder / "trial-002.log").exists() else True:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 128 + number and "repeat the command" in error
    assert [status for _, _, status, _ in trials(folder)] == ["finished", "stopped", "waiting", "waiting"]
    assert (folder / "sweep.html").exists()
    faults(folder)
    assert sweep(folder, *GRID) == 0
    assert started(folder) == ["trial-001", "trial-002", "trial-002", "trial-003", "trial-004"]
    assert [metric for *_, metric in trials(folder)] == [1.04, 1.08, 0.04, 0.08]


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path, capsys):
    (tmp_path / "s").mkdir()
    with FileLock(tmp_path / "s" / ".lock"):
        assert sweep(tmp_path / "s", *GRID) == 2
    assert "sweep.out=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("lora.rank=4,-8", "train.learning_rate=1e-3,x"), "with lora.rank=4 train.learning_rate=x: 1 problem"),
        (("lora.rank=4,8", "sweep.metric=speed"), "sweep.metric=speed"),
        (("lora.rank=4,8", "sweep.metric=recovered"), "needs distill.objective=recover"),
        (("lora.rank=4,8", "sweep.metric=eval/heldout/rouge_l"), "set generation.metrics=[rouge_l]"),
        (("lora.rank=4,8", "sweep.metric=eval/heldout/teacher_kl"), "sweep.metric=eval/heldout/teacher_kl"),
        (("lora.rank=4,8", "preference.objective=dpo", "sweep.metric=eval/heldout/accuracy"), "loss, reward_accuracy"),
        (("lora.rank=4,8", "data.eval=[]", "generation.num_examples=0"), "data.held_out"),
        (("lora.rank=4,8", "sweep.metrc=a"), "did you mean sweep.metric?"),
        (("quant.type=nf4,none", "lora.init=default,loftq"), "with quant.type=none lora.init=loftq: 1 problem"),
    ],
)
def test_no_run_starts_with_an_invalid_combination(tmp_path: Path, words: tuple[str, ...], found: str, capsys):
    assert sweep(tmp_path / "s", *words) == 2
    assert found in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_a_folder_of_another_sweep_is_unchanged(finished: Path, capsys):
    before = (finished / RECORD).read_bytes()
    assert sweep(finished, "train.learning_rate=1e-3,3e-3", "lora.rank=4,8", "train.max_steps=9") == 2
    error = capsys.readouterr().err
    assert "train.learning_rate: 1e-3,2e-3 there, found 1e-3,3e-3" in error
    assert "train.max_steps: 60 there, found 9" in error and (finished / RECORD).read_bytes() == before


def test_a_dry_run_lists_every_run_and_makes_no_folder(tmp_path: Path, capsys):
    assert sweep(tmp_path / "s", *GRID, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"train.learning_rate={rate} lora.rank={rank}" for rate in ("0.001", "0.002") for rank in (4, 8)
    ]
    assert not (tmp_path / "s").exists()
