"""Sizes and durations read the same wherever a person meets them."""

from __future__ import annotations

import pytest

from finetune.system.format import first_lines, format_bytes, format_duration, format_estimate


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 kB"), (1536, "1.5 kB"), (97_000_000, "97.0 MB"), (1.59e9, "1.59 GB"), (1.2345e12, "1,234.50 GB")],
)
def test_sizes_are_powers_of_ten(size: float, text: str):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (4.21, "4.2 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (97_200, "1 d 3 h")],
)
def test_durations_have_two_units_at_most(seconds: float, text: str):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0341, "0.034 s"),
        (4.21, "4.2 s"),
        (32.41, "32 s"),
        (204, "3 min 20 s"),
        (7544, "2 h 5 min"),
        (59.9, "1 min 0 s"),
    ],
)
def test_estimates_have_two_digits(seconds: float, text: str):
    assert format_estimate(seconds) == text


def test_the_first_lines_say_how_many_more_there_are_and_no_other_line_is_made():
    lines = (f"row {number}" for number in range(1200))
    assert first_lines(lines, 1200, 2) == ["row 0", "row 1", "  … and 1,198 more"]
    assert next(lines) == "row 2"
    assert first_lines(["a", "b"], 2, 2) == ["a", "b"]
