"""A run's folder is read even with missing or corrupt files."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.report.run import read_run, read_runs
from finetune.system.errors import InputError
from tests.run_folders import write_run


def test_all_of_a_run_is_read(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a", evaluations={"eval/heldout/accuracy": 0.75}))
    assert (run.name, run.status, run.has_adapter, run.problems) == ("quickstart", "finished", True, ())
    assert run.figure("eval_loss") == pytest.approx(4 / 21) and run.figure("eval/heldout/accuracy") == 0.75
    assert run.figure("error") is None and run.figure("nothing") is None
    assert run.metrics["loss"].steps == list(range(1, 21)) and run.metrics["eval_loss"].steps == [10, 20]


@pytest.mark.parametrize("corrupt", ["result.json", "run.json", "samples.json", "config.yaml"])
def test_a_corrupt_file_is_named_and_the_rest_is_read(tmp_path: Path, corrupt: str):
    folder = write_run(tmp_path / "a")
    (folder / corrupt).write_bytes(b'{"a": [\xff')
    run = read_run(folder)
    assert len(run.problems) == 1 and run.problems[0].startswith(f"{corrupt}: cannot be read")
    assert run.metrics["loss"].steps


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_an_unexpected_type_is_a_problem_and_not_a_crash(tmp_path: Path, content: str):
    folder = write_run(tmp_path / "a")
    (folder / "result.json").write_text(content)
    run = read_run(folder)
    assert run.problems and run.status == "unfinished" and run.figure("eval_loss") is None


def test_a_killed_run_is_unfinished(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    for name in ("result.json", "run.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    assert read_run(folder).status == "unfinished"


def test_all_folders_that_hold_no_run_are_named_at_once(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        read_runs([write_run(tmp_path / "a"), tmp_path / "missing", tmp_path / "empty"])
    text = str(caught.value)
    assert "missing: no such folder" in text and "empty: holds no run" in text and f"{tmp_path / 'a'}:" not in text
