"""`finetune eval` as a user runs it: fresh processes on one short run, its files, its refusals, a stop in between."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.evaluation.gap_table import load_gap
from finetune.system.resources import packaged
from tests.runs import reference_run

FIGURES = {"loss", "perplexity", "accuracy", "score", "kl", "kl_p99", "top1"}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A user's folder with a run of a few steps in it."""
    shutil.copytree(reference_run(), tmp_path / "run")
    return tmp_path


def test_a_run_is_measured_beside_its_base_and_merged(finetune_command, here):
    (here / "mine.py").write_text("def length(prompt, expected, given):\n    return len(given) / len(expected)\n")
    others = packaged("data") / "sample" / "train.jsonl"
    (here / "run" / "report.html").touch()  # A report that exists is drawn again.
    done = finetune_command(
        "eval",
        "adapter=run",
        "limit=6",
        "answers=3",
        f"forgetting=[{{path: {others}}}]",
        "metric=mine.py:length",
        "resamples=100",
    )
    assert done.returncode == 0, done.stderr
    table = load_gap(here / "run")
    assert [model.name for model in table.models] == ["bf16 base", "NF4 base", "NF4 + adapter", "merged"]
    task, forgetting = table.models[2].sets
    assert (task.rows, task.answered, forgetting.rows, forgetting.answered) == (6, 3, 6, 0)
    assert set(task.figures) == FIGURES and table.metric == "length"
    base = table.models[0].sets[0]
    # Four steps from 1.2 nats: far more than what 4 bits and merging change.
    assert task.figures["loss"].value < 0.8 * base.figures["loss"].value
    kept = abs(table.models[3].sets[0].figures["loss"].value - task.figures["loss"].value)
    assert kept < 0.1 * (base.figures["loss"].value - task.figures["loss"].value)
    assert done.stdout == (here / "run" / "gap.md").read_text() and "| NF4 + adapter " in done.stdout
    assert (here / "run" / "gap.png").read_bytes().startswith(b"\x89PNG")
    assert "NF4 + adapter" in (here / "run" / "report.html").read_text(), "the report was drawn again"
    assert "warning: forgetting[0]:" in done.stderr, "it was trained on these rows"
    assert not list((here / "run").glob(".eval-*"))


def test_a_model_alone_and_the_documented_task_as_json(finetune_command, here, repo_root):
    pytest.importorskip("lm_eval", reason='needs: pip install "finetune-qlora[eval]"')
    page = (repo_root / "docs" / "evaluation.md").read_text()
    (here / "task.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[0])
    rows = [{"question": f"{n} plus 2", "answer": f"{n} + 2 = {n + 2}\n#### {n + 2}"} for n in (1, 3, 1000)]
    (here / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = packaged("data") / "tiny-qwen2.5"
    done = finetune_command("eval", f"model={base}", "quant=nf4", "tasks=[task.yaml]", "out=found", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((here / "found" / "gap.json").read_text())
    models = load_gap(here / "found").models
    assert [model.name for model in models] == ["bf16 model", "NF4 model"]
    for model in models:
        (task,) = model.tasks
        assert not model.sets and (task.task, task.metric, task.rows) == ("gsm8k_local", "exact_match (last number)", 3)
    assert not (here / "found" / "gap.png").exists(), "tasks alone have no picture"


def test_all_problems_are_reported_at_once_and_nothing_is_written(finetune_command, here):
    done = finetune_command("eval", "adapter=run", "model=x", "metric=regex", "merged=m", "variants=[base]")
    assert done.returncode == 2
    for key in ("adapter, model: ", "pattern: ", "merged: "):
        assert key in done.stderr
    (here / "run" / "gap.json").write_text("{")
    torn = finetune_command("eval", "adapter=run", "limit=1")
    assert torn.returncode == 3 and "gap.json" in torn.stderr
    assert not (here / "run" / "gap.md").exists()


def test_a_stop_leaves_the_run_as_it_was(here):
    before = sorted(path.name for path in (here / "run").iterdir())
    words = [sys.executable, "-m", "finetune.cli", "eval", "adapter=run", "resamples=100000", "limit=24"]
    process = subprocess.Popen(
        words,
        cwd=here,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores Ctrl+C
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "measured in" in line:
            break
    assert list((here / "run").glob(".eval-*/merged")), "temporary files are beside the run's files"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and process.stderr.read().endswith("stopped by Ctrl+C\n")
    assert sorted(path.name for path in (here / "run").iterdir()) == before
