"""The table and the pictures of a sweep: what stands where, whatever its values are."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.lines import Line2D

from finetune.sweep.outcome import effect_pictures, effects, table
from finetune.sweep.record import Record, Trial
from tests.run_folders import write_run


def record_of(values: list[str], minimize: bool = True, key: str = "lora.rank") -> Record:
    metrics = [float(abs(i - 1)) for i in range(len(values))]  # the second is the least
    trials = [Trial(i + 1, {key: value}, "finished", metrics[i]) for i, value in enumerate(values)]
    return Record({}, "eval_loss", minimize, trials)


def heights(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata()).tolist()


def test_the_table_has_each_runs_own_figures(tmp_path: Path):
    record = record_of(["4", "8"])
    for trial, final_loss in zip(record.trials, (1.5, 0.5), strict=True):
        write_run(tmp_path / trial.folder_name, eval_loss=trial.metric, final_loss=final_loss, peak_bytes=2**31)
    record.trials.append(Trial(3, {"lora.rank": "16"}, "failed", error="no memory\nof any kind"))
    record.trials.append(Trial(4, {"lora.rank": "8"}, "finished", record.trials[1].metric, same_as=2))
    assert table(tmp_path, record) == [
        ["run", "lora.rank", "held-out loss", "training loss", "training time", "peak memory", "status"],
        ["trial-002", "8", "0.0000", "0.5000", "1 min 01 s", "2.00 GiB", "finished"],
        ["trial-004", "8", "0.0000", "0.5000", "1 min 01 s", "2.00 GiB", "as trial-002"],
        ["trial-001", "4", "1.0000", "1.5000", "1 min 01 s", "2.00 GiB", "finished"],
        ["trial-003", "16", "", "", "", "", "failed: no memory"],
    ]


@pytest.mark.parametrize(
    ("values", "ticks", "scale"),
    [
        (["1e-3", "2e-3"], ["0.001", "0.002"], "linear"),
        (["4", "8", "32"], ["4", "8", "32"], "log"),
        (["0", "10"], ["0", "10"], "linear"),
        (["all-linear", "[q_proj,v_proj,k_proj]"], ["all-linear", "[q_proj,v_proj,…"], "linear"),
        (["true", "null"], ["true", "null"], "linear"),
    ],
)
def test_few_values_are_the_ticks_and_a_wide_range_is_logarithmic(values: list[str], ticks: list[str], scale: str):
    (axes,) = effects(record_of(values)).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ticks and axes.get_xscale() == scale
    *_, dots, best = axes.lines
    assert sorted(heights(dots)) == sorted(float(abs(i - 1)) for i in range(len(values)))
    assert heights(best) == [0.0]


@pytest.mark.parametrize(
    "values", [["0.001252", "0.0006804", "0.0007447"], ["1e-05", "1.1e-05", "0.1"], ["1", "2", "40"]]
)
def test_ticks_leave_each_other_room(values: list[str]):
    drawn = effects(record_of(values))
    drawn.canvas.draw()
    (axes,) = drawn.axes
    left, right = axes.get_xlim()
    boxes = [
        label.get_window_extent()
        for label, place in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)
        if left <= place <= right and label.get_text()
    ]
    assert len(boxes) > 1 and all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_the_line_goes_through_the_best_of_each_value():
    trials = [
        Trial(i, {"a": str(a), "b": str(b)}, "finished", float(a * 10 + b))
        for i, (a, b) in enumerate([(1, 1), (1, 2), (2, 1), (2, 2)], 1)
    ]
    for minimize, bests in ((True, [11.0, 21.0]), (False, [12.0, 22.0])):
        axes, _ = effects(Record({}, "eval_loss", minimize, trials)).axes
        assert heights(axes.lines[0]) == bests


@pytest.mark.parametrize("values", [["4"], ["1e-05", "0.003", "0.0004"], ["x" * 99, "y"], [str(i) for i in range(30)]])
def test_every_picture_is_drawn_and_well_formed(values: list[str]):
    (picture,) = effect_pictures(record_of(values))
    paths = [node.get("d", "") for node in ElementTree.fromstring(picture.svg).iter() if node.tag.endswith("path")]
    assert picture.title == "lora.rank" and len(paths) > 3 and all(paths)
