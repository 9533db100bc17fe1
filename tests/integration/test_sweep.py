"""Real sweeps: each run equals one of `finetune train`, also after kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import load_config, train
from tests.browser import CONTRAST, DRAWN, Page
from tests.runs import SMALL_RUN, adapter, differing, metrics, result

RATES = ("0.001", "0.004")
STEPS = 6
SETTINGS = (*SMALL_RUN, f"train.max_steps={STEPS}", "data.eval.0.limit=8", "lora.rank=4")


GRID = (f"train.learning_rate={','.join(RATES)}",)
# Three trials to step 1, one of them to the end.
SEARCH = ("sweep.space=auto", "sweep.budget=1.5", "train.max_steps=4")


def command(folder: Path, *words: str) -> list[str]:
    sweep = ["sweep", "config=quickstart.yaml", *SETTINGS, *words, f"sweep.out={folder}"]
    return [sys.executable, "-m", "finetune.cli", *sweep]


def kill_in_second_run(command: list[str], folder: Path, line: str) -> None:
    """Start a sweep, and kill it when its second run has written `line`."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(line, folder / "trial-002" / "metrics.jsonl", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(what: str, file: Path, process: subprocess.Popen) -> None:
    while what not in (file.read_text() if file.exists() else ""):
        assert process.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Train each combination with `finetune train`."""
    folders = [tmp_path_factory.mktemp("plain") / rate for rate in RATES]
    for folder, rate in zip(folders, RATES, strict=True):
        train(load_config("quickstart.yaml", [*SETTINGS, f"train.learning_rate={rate}", f"output_dir={folder}"]))
    return folders


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], dict[Path, int], str]:
    """Kill a sweep in its second run, and resume it.

    Returns: its folder, the record's trials at the kill, the write times of the first run's files, and the output of
    the second command.
    """
    folder = tmp_path_factory.mktemp("sweep") / "s"
    kill_in_second_run(command(folder, *GRID), folder, '"step": 2')
    record = json.loads((folder / "sweep.json").read_text())
    files = {file: file.stat().st_mtime_ns for file in (folder / "trial-001").rglob("*") if file.is_file()}
    done = subprocess.run(command(folder, *GRID), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder, record["trials"], files, done.stdout


def test_a_killed_sweep_resumes_and_leaves_finished_runs_unchanged(swept):
    folder, trials, files, _ = swept
    assert [trial["status"] for trial in trials] == ["finished", "running"]
    assert {file: file.stat().st_mtime_ns for file in files} == files
    log = (folder / "trial-002.log").read_text()
    assert "stopping after this step" in log and "continuing from" in log
    assert "error" not in (folder / "trial-001.log").read_text()


def test_every_run_equals_one_of_finetune_train(swept, plain: list[Path]):
    folder, *_ = swept
    for number, alone in enumerate(plain, 1):
        trial = folder / f"trial-{number:03d}"
        assert differing(trial, alone) == [] and len(adapter(trial)) > 0
        assert metrics(trial) == metrics(alone) and len(metrics(trial)) == STEPS
        assert result(trial)["eval_loss"] == result(alone)["eval_loss"]
    assert differing(*plain)


def test_the_record_and_the_table_are_complete_with_the_best_first(swept, plain: list[Path]):
    folder, _, _, printed = swept
    record = json.loads((folder / "sweep.json").read_text())
    losses = [result(alone)["eval_loss"] for alone in plain]
    assert [trial["status"] for trial in record["trials"]] == ["finished", "finished"]
    assert [trial["metric"] for trial in record["trials"]] == losses
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    order = sorted(range(len(RATES)), key=losses.__getitem__)
    assert [line[:3] for line in lines] == [[f"trial-{i + 1:03d}", RATES[i], f"{losses[i]:.4f}"] for i in order]
    assert record["best"] == order[0] + 1


def test_the_page_draws_the_effects_and_the_curves(browser: Page, swept):
    folder, *_ = swept
    browser.look()
    browser.open(folder / "sweep.html")
    drawn = browser.evaluate(DRAWN)
    assert drawn[0][0] == "train.learning_rate" and len(drawn) == 6, "curves of one point are numbers"
    assert all(len(shapes) > 2 and all(shapes) for _, shapes in drawn)
    assert browser.troubles() == [] and browser.evaluate(CONTRAST) == []
    browser.look(360)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_search_equals_an_undisturbed_one(tmp_path: Path):
    pytest.importorskip("optuna")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    kill_in_second_run(command(killed, *SEARCH), killed, '"step": 1')
    for folder in (killed, undisturbed):
        done = subprocess.run(command(folder, *SEARCH), capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
    records = [json.loads((folder / "sweep.json").read_text()) for folder in (killed, undisturbed)]
    assert records[0]["trials"] == records[1]["trials"] and records[0]["best"] == records[1]["best"]
    assert [trial["status"] for trial in sorted(records[0]["trials"], key=lambda each: len(each["rungs"]))] == [
        "paused",
        "paused",
        "finished",
    ]
    best = f"trial-{records[0]['best']:03d}"
    assert differing(killed / best, undisturbed / best) == [] and len(adapter(killed / best)) > 0
    for trial in (f"trial-{number:03d}" for number in (1, 2, 3)):
        steps = [line["step"] for line in metrics(killed / trial)]
        assert steps == [line["step"] for line in metrics(undisturbed / trial)] and len(steps) == len(set(steps))
