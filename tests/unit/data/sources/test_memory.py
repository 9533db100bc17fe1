"""Rows in memory train as the same rows of a file do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from finetune import train
from finetune.data.sources.memory import write_rows
from finetune.system.errors import DataError
from tests.runs import differing, small_run

ROWS = [{"prompt": f"Say {n}.", "completion": f"{n} it is, ü."} for n in range(12)]


def test_a_list_and_a_dataset_give_one_file_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    file = write_rows(ROWS)
    assert [json.loads(line) for line in file.read_text().splitlines()] == ROWS
    assert write_rows(Dataset.from_list(ROWS)) == file == write_rows(iter(ROWS))
    assert write_rows(ROWS[:5]) != file


@pytest.mark.parametrize("rows", [[], ["text"], [{"prompt": object()}], [{"weight": float("nan")}]])
def test_what_is_no_row_is_refused(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="rows"):
        write_rows(rows)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_rows_in_memory_train_as_those_of_a_file(tmp_path: Path):
    words = ("data.eval=[]", "train.max_steps=2", "data.max_length=64")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    train(small_run(tmp_path / "file", *words, f"data.train={tmp_path / 'rows.jsonl'}"))
    train(small_run(tmp_path / "memory", *words), rows=ROWS)
    assert differing(tmp_path / "file", tmp_path / "memory") == []
