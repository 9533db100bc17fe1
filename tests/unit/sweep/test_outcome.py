"""The table of a sweep has the best run first, with each run's own results."""

from __future__ import annotations

from pathlib import Path

from finetune.sweep.outcome import results_of, table
from finetune.sweep.record import Record, Trial
from tests.run_folders import write_run


def test_the_table_has_each_runs_own_results(tmp_path: Path):
    trials = [Trial(i, {"lora.rank": rank}, "finished", metric) for i, rank, metric in ((1, "4", 1.0), (2, "8", 0.0))]
    record = Record({}, "eval_loss", True, trials)
    for trial, final_loss in zip(record.trials, (1.5, 0.5), strict=True):
        write_run(tmp_path / trial.folder_name, eval_loss=trial.metric, final_loss=final_loss, peak_bytes=2**31)
    record.trials.append(Trial(3, {"lora.rank": "16"}, "failed", error="no memory\nof any kind"))
    record.trials.append(Trial(4, {"lora.rank": "8"}, "finished", record.trials[1].metric, same_as=2))
    assert table(tmp_path, record) == [
        ["run", "lora.rank", "held-out loss", "training loss", "training time", "peak memory", "status"],
        ["trial-002", "8", "0.0000", "0.5000", "1 min 1 s", "2.15 GB", "finished"],
        ["trial-004", "8", "0.0000", "0.5000", "1 min 1 s", "2.15 GB", "as trial-002"],
        ["trial-001", "4", "1.0000", "1.5000", "1 min 1 s", "2.15 GB", "finished"],
        ["trial-003", "16", "", "", "", "", "failed: no memory"],
    ]
    results = results_of(record)
    assert results is not None and results.runs == [({"lora.rank": "4"}, 1.0), ({"lora.rank": "8"}, 0.0)]


def test_a_sweep_without_a_measured_run_has_no_results():
    assert results_of(Record({}, "eval_loss", True, [Trial(1, {"a": "1"}, "failed")])) is None
