"""Pictures of a sweep have legible axes and mark the best run."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.lines import Line2D

from finetune.report.sweep import SweepResults, effect_pictures, effects_figure


def results_of(values: list[str]) -> SweepResults:
    """Build results with the best run second."""
    runs = [({"lora.rank": value}, float(abs(i - 1))) for i, value in enumerate(values)]
    return SweepResults("held-out loss", True, runs)


def heights(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata()).tolist()


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
    (axes,) = effects_figure(results_of(values)).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ticks and axes.get_xscale() == scale
    *_, dots, best = axes.lines
    assert sorted(heights(dots)) == sorted(float(abs(i - 1)) for i in range(len(values)))
    assert heights(best) == [0.0]


@pytest.mark.parametrize(
    "values", [["0.001252", "0.0006804", "0.0007447"], ["1e-05", "1.1e-05", "0.1"], ["1", "2", "40"]]
)
def test_ticks_leave_each_other_room(values: list[str]):
    drawn = effects_figure(results_of(values))
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
    runs = [({"a": str(a), "b": str(b)}, float(a * 10 + b)) for a, b in ((1, 1), (1, 2), (2, 1), (2, 2))]
    for minimize, bests in ((True, [11.0, 21.0]), (False, [12.0, 22.0])):
        axes, _ = effects_figure(SweepResults("held-out loss", minimize, runs)).axes
        assert heights(axes.lines[0]) == bests


@pytest.mark.parametrize("values", [["4"], ["1e-05", "0.003", "0.0004"], ["x" * 99, "y"], [str(i) for i in range(30)]])
def test_every_picture_is_drawn_and_well_formed(values: list[str]):
    (picture,) = effect_pictures(results_of(values))
    paths = [node.get("d", "") for node in ElementTree.fromstring(picture.svg).iter() if node.tag.endswith("path")]
    assert picture.title == "lora.rank" and len(paths) > 3 and all(paths)
