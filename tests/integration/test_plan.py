"""`finetune plan` and the predictions of `finetune train` in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune import train
from finetune.planning import timing
from finetune.report.run import ADAPTER
from finetune.training import recipe
from tests.runs import SMALL_RUN, small_run
from tests.unit.planning.test_timing import RATES

WIDE = ("data.max_length=512", "train.batch_size=8", "train.micro_batch_size=8")


def test_a_run_tells_what_it_expected_and_what_it_took(finetune_command, tmp_path: Path):
    done = finetune_command(
        "train", "config=quickstart.yaml", *SMALL_RUN, "train.max_steps=1", f"output_dir={tmp_path}/run"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["peak_bytes"] > 0 and result["predicted_peak_bytes"] > 0
    assert "GB measured" in done.stdout and "GB predicted" in done.stdout
    topics = [line.partition(":")[0] for line in done.stderr.partition("\nstep ")[0].splitlines()]
    assert topics == ["model", "data", "data", "memory", "evaluation"] and "predicted_peak=" in done.stderr


def test_rates_change_the_predicted_time_and_no_bit_of_the_run(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    results = []
    for name in ("assumed", "measured"):
        train(small_run(tmp_path / name, "train.max_steps=1"))
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
        timing.write_rates("cpu", RATES)
        timing.write_rates("cuda", RATES)
    assert [result["predicted_time_source"].split()[0].strip(":") for result in results] == ["assumed", "measured"]
    assert results[0]["predicted_train_seconds"] != results[1]["predicted_train_seconds"] > 0
    first, second = ((tmp_path / name / ADAPTER).read_bytes() for name in ("assumed", "measured"))
    assert first == second


@pytest.mark.parametrize("verbose", [False, True])
def test_a_run_that_will_not_fit_says_so_before_it_loads_and_what_would(tmp_path, monkeypatch, capsys, verbose: bool):
    monkeypatch.setattr(recipe, "free_memory", lambda kind: 680e6)
    train(small_run(tmp_path / "run", "train.max_steps=1", *WIDE), verbose=verbose)
    logged = capsys.readouterr().err
    assert ("predicted peak:" in logged) == ("compile:" in logged) == ("kernels:" in logged) == verbose
    warning = logged.index("WARNING: ")
    assert "0.68 GB is free" in logged
    assert warning < logged.index(" saves ") < logged.index("memory: micro_batch=")  # logged after loading


def test_a_plan_is_printed_and_its_exit_code_says_whether_it_fits(finetune_command):
    fits = finetune_command("plan", "config=lora.yaml", "gpu_gb=24")
    assert fits.returncode == 0 and fits.stdout.startswith("fits: ")
    too_large = finetune_command("plan", "config=lora.yaml", "model=qwen2.5-72b", "gpu_gb=24", "--json")
    assert too_large.returncode == 3 and json.loads(too_large.stdout)["changes"]


def test_a_dry_run_warns_of_what_does_not_fit(finetune_command, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    done = finetune_command(
        "train",
        "config=lora.yaml",
        "model=qwen2.5-72b",
        f"data.train={tmp_path}/a.jsonl",
        "data.max_length=131072",
        "--dry-run",
    )
    assert done.returncode == 0
    assert "# predicted peak:" in done.stdout and "WARNING" in done.stdout and "saves" in done.stdout
