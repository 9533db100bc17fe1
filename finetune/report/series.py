"""Read metrics.jsonl as curves, and reduce them to the points that a picture shows."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Series(NamedTuple):
    """Finite values [N] by ascending steps [N]."""

    steps: list[int]
    values: list[float]

    def scaled(self, factor: float) -> Series:
        return Series(self.steps, [value * factor for value in self.values])


def read_metrics(file: Path) -> dict[str, Series]:
    """Read every metric by name. Raises OSError.

    The last line of a step counts (a resumed run repeats steps). Incomplete lines and non-finite values are left out.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for line in _lines(file):
        step = line["step"]
        for name, value in line.items():
            if name != "step" and is_figure(value):
                found[name][step] = float(value)
    return {name: Series(*map(list, zip(*sorted(values.items()), strict=True))) for name, values in found.items()}


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and type(line.get("step")) is int:
                yield line


def is_figure(value: Any) -> bool:
    """Return whether a value is a number that can be drawn."""
    # False for nan; a Python integer can exceed every float.
    return type(value) in (int, float) and abs(value) < 1e300


def thinned(series: Series, most: int = 800) -> Series:
    """Keep at most `most` points: the first, the last, and the lowest and highest of every interval of steps.

    A spike of one step among 100,000 stays visible.
    """
    count = len(series.steps)
    if count <= most:
        return series
    buckets = (most - 2) // 2
    kept = {0, count - 1}
    for bucket in range(buckets):
        places = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        kept |= {min(places, key=series.values.__getitem__), max(places, key=series.values.__getitem__)}
    places = sorted(kept)
    return Series([series.steps[i] for i in places], [series.values[i] for i in places])


def smoothed(series: Series, share: float = 0.05) -> Series:
    """Return the moving average over a window of `share` of the run."""
    count = len(series.values)
    half = max(1, round(count * share / 2))
    sums = [0.0]
    for value in series.values:
        sums.append(sums[-1] + value)
    ends = [(max(0, i - half), min(count, i + half + 1)) for i in range(count)]
    return Series(series.steps, [(sums[end] - sums[start]) / (end - start) for start, end in ends])


def spread(values: Sequence[float]) -> float:
    """Return the largest value divided by the smallest; infinity if one is not positive."""
    return max(values) / min(values) if min(values) > 0 else math.inf
