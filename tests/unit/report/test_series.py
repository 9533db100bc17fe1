"""Curves of metrics.jsonl: each step once, and every spike stays visible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.report import curves
from finetune.report.curves import QUANTITIES, Line, smoothed, thinned
from finetune.report.run import Series, read_metrics


def write(file: Path, *lines: object) -> Path:
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return file


def test_the_last_value_of_a_repeated_step_counts(tmp_path: Path):
    first = [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]
    again = [{"step": step, "loss": 10.0 * step} for step in (3, 4, 5)]
    found = read_metrics(write(tmp_path / "m", *first, *again))["loss"]
    assert found == ([1, 2, 3, 4, 5], [1.0, 2.0, 30.0, 40.0, 50.0])


def test_other_values_than_finite_numbers_are_left_out(tmp_path: Path):
    lines = [
        {"step": 1, "loss": float("nan"), "grad_norm": 1},
        {"step": 2, "loss": 2.0, "note": "x", "flag": True, "huge": 10**400},
        {"loss": 3.0},
        [1, 2],
        {"step": "4", "loss": 4.0},
        {"step": 5, "loss": float("inf")},
        '{"step": 6, "loss": 6.',
    ]
    found = read_metrics(write(tmp_path / "m", *lines))
    assert found == {"grad_norm": ([1], [1.0]), "loss": ([2], [2.0])}


def test_an_empty_file_has_no_metrics(tmp_path: Path):
    assert read_metrics(write(tmp_path / "m")) == {}


@pytest.mark.parametrize("place", [0, 1, 57_123, 99_998, 99_999])
@pytest.mark.parametrize("spike", [50.0, -50.0])
def test_a_spike_of_one_step_among_a_hundred_thousand_stays_visible(place: int, spike: float):
    values = [1.0 + 0.001 * (i % 7) for i in range(100_000)]
    values[place] = spike
    few = thinned(Series(list(range(100_000)), values))
    assert len(few.steps) <= 800
    assert spike in few.values and few.steps[few.values.index(spike)] == place


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(4, 60))
def test_thinning_keeps_ends_extremes_and_order(values: list[float], most: int):
    series = Series(list(range(len(values))), values)
    few = thinned(series, most)
    assert len(few.steps) <= most
    assert few.steps == sorted(set(few.steps)) and all(values[step] == v for step, v in zip(*few, strict=True))
    assert (few.steps[0], few.steps[-1]) == (0, len(values) - 1)
    assert (min(few.values), max(few.values)) == (min(values), max(values))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=100))
def test_a_moving_average_stays_within_its_values(values: list[float]):
    found = smoothed(Series(list(range(len(values))), values))
    assert len(found.values) == len(values)
    assert min(values) - 1e-6 <= min(found.values) and max(found.values) <= max(values) + 1e-6


def test_the_moving_average_of_a_line_is_the_line():
    series = Series(list(range(100)), [float(i) for i in range(100)])
    assert smoothed(series).values[10:90] == pytest.approx(series.values[10:90])


@pytest.mark.parametrize(("longest", "averaged"), [(40, []), (41, [40, 41])])
def test_the_curves_of_a_picture_are_all_averaged_or_none(monkeypatch, longest: int, averaged: list[int]):
    seen = []
    monkeypatch.setattr(curves, "smoothed", lambda series: seen.append(len(series.steps)) or series)
    lines = [
        Line(str(count), Series(list(range(count)), [1.0 + step for step in range(count)]), False, color, "-")
        for count, color in ((40, "#0072B2"), (longest, "#D55E00"))
    ]
    (gradient,) = (quantity for quantity in QUANTITIES if "grad_norm" in quantity.names)
    curves.draw("title", lines, gradient, longest)
    assert seen == averaged
