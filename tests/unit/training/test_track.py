"""metrics.jsonl survives crashes: a resumed run cuts the steps it repeats and keeps all earlier bytes."""

from __future__ import annotations

import json

from finetune.training.track import METRICS, MetricsFile


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_steps_after_the_checkpoint_and_an_incomplete_line_are_cut(tmp_path):
    first = MetricsFile(tmp_path, resumed_step=0)
    for step in range(1, 6):
        first.log({"step": step, "loss": step / 3})
    first.close()
    kept = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)[:3]
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"step": 6, "lo')
    resumed = MetricsFile(tmp_path, resumed_step=3)
    resumed.log({"step": 4, "loss": 0.0})
    resumed.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / METRICS).read_bytes().splitlines(keepends=True)[:3] == kept


def test_a_new_run_empties_the_file_and_writes_each_line_at_once(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n')
    metrics = MetricsFile(tmp_path, resumed_step=0)
    metrics.log({"step": 1, "loss": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]
    metrics.close()
