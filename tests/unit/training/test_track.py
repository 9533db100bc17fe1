"""metrics.jsonl survives crashes: a resumed run cuts the steps it repeats. Evaluations are printed."""

from __future__ import annotations

import json
import re
from contextlib import closing

from finetune.training.track import METRICS, MetricsFile, Tracker
from tests.runs import small_run


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


def test_every_evaluation_is_printed_with_the_best_so_far_also_after_a_resume(tmp_path, capsys):
    def step(tracker: Tracker, number: int, **evaluation: float) -> None:
        values = dict.fromkeys(("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes"), 1.0)
        tracker.step({"step": number, **values, **evaluation}, 0.0)

    cfg = small_run(tmp_path)
    with closing(Tracker(cfg, tmp_path, 5, 0)) as tracker:
        step(tracker, 1)
        step(tracker, 2, eval_loss=0.5, **{"eval/rows/accuracy": 0.25, "eval/rows/loss": 0.5})
    with closing(Tracker(cfg, tmp_path, 5, 2)) as tracker:
        step(tracker, 3, eval_loss=0.75)
        step(tracker, 5, eval_loss=0.25)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation:")]
    assert [re.search(r"step=(\d)/5, eval_loss=([\d.]+) \((.*?)\)", line).groups() for line in lines] == [
        ("2", "0.5000", "best so far"),
        ("3", "0.7500", "best 0.5000"),
        ("5", "0.2500", "best so far"),
    ]
    assert "rows/accuracy=0.25" in lines[0] and "rows/loss" not in lines[0]
