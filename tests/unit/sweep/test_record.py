"""sweep.json is read back unchanged and refuses another sweep; the table has the best run first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.sweep.outcome import table
from finetune.sweep.record import RECORD, Record, Trial, check_same, load_record
from finetune.system.errors import ConfigError, IntegrityError
from tests.run_folders import write_run

TRIALS = [
    Trial(1, {"lora.rank": "4"}, "finished", 2.0),
    Trial(2, {"lora.rank": "8"}, "failed", None, "no\nmemory"),
    Trial(3, {"lora.rank": "16"}, "finished", 1.0),
    Trial(4, {"lora.rank": "16"}, "finished", 1.0, same_as=3),
    Trial(5, {"lora.rank": "32"}),
]


def test_a_record_is_read_back_unchanged(tmp_path: Path):
    record = Record({"lora.rank": "4,8", "data.train.0.limit": None}, "eval_loss", True, TRIALS)
    record.save(tmp_path)
    assert load_record(tmp_path) == record
    assert json.loads((tmp_path / RECORD).read_text())["best"] == 3


@pytest.mark.parametrize(("minimize", "order"), [(True, [3, 4, 1, 2, 5]), (False, [1, 3, 4, 2, 5])])
def test_the_best_is_first_and_runs_without_a_metric_last(minimize: bool, order: list[int]):
    assert [trial.number for trial in Record({}, "x", minimize, TRIALS).ranked()] == order


def test_a_repeated_trial_points_to_the_folder_of_the_first():
    assert (TRIALS[3].folder_name, TRIALS[2].folder_name) == ("trial-003", "trial-003")


def test_an_empty_folder_holds_no_sweep(tmp_path: Path):
    assert load_record(tmp_path) is None and load_record(tmp_path / "new") is None


def test_a_corrupt_record_and_runs_without_one_are_refused(tmp_path: Path):
    (tmp_path / "trial-001").mkdir()
    with pytest.raises(ConfigError, match=r"sweep\.out=.*holds runs"):
        load_record(tmp_path)
    (tmp_path / RECORD).write_text('{"spec": {')
    with pytest.raises(IntegrityError, match=r"sweep\.json: corrupt"):
        load_record(tmp_path)


def test_every_difference_from_the_sweep_of_a_folder_is_named(tmp_path: Path):
    old = {"a": "1,2", "b": [1], "c": 3, "same": {"x": 1}}
    check_same(tmp_path, old, {**old})
    with pytest.raises(ConfigError) as caught:
        check_same(tmp_path, old, {"a": "1,3", "b": [1], "d": 4, "same": {"x": 1}})
    lines = str(caught.value).splitlines()[1:-1]
    assert lines == ["  a: 1,2 there, found 1,3", "  c: 3 there, found nothing", "  d: nothing there, found 4"]


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
    results = record.results()
    assert results is not None and results.runs == [({"lora.rank": "4"}, 1.0), ({"lora.rank": "8"}, 0.0)]


def test_a_sweep_without_a_measured_run_has_no_results():
    assert Record({}, "eval_loss", True, [Trial(1, {"a": "1"}, "failed")]).results() is None
