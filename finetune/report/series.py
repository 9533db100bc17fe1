"""metrics.jsonl as curves: one value a step, whatever happened to the run, and no more points than a picture shows."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Series(NamedTuple):
    """Values by step, ascending. steps [N], values [N]; every value is finite."""

    steps: list[int]
    values: list[float]

    def scaled(self, factor: float) -> Series:
        return Series(self.steps, [value * factor for value in self.values])


def read_metrics(file: Path) -> dict[str, Series]:
    """Every figure of a run by name.

    A step that stands in the file twice (a run that was continued) counts as it was the last time; lines that are torn
    and values that are no finite numbers are left out. Raises: OSError.
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
    """Whether it is a number that can be drawn."""
    # nan is below nothing, and a whole number may be larger than any float.
    return type(value) in (int, float) and abs(value) < 1e300


def thinned(series: Series, most: int = 800) -> Series:
    """At most `most` points that look the same: of every stretch of steps the lowest and the highest value, in order.

    First and last point stay, and a spike of one step among 100,000 is still there.
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
    """The mean of the neighborhood of every step, `share` of the run wide: what a noisy curve does on the whole."""
    count = len(series.values)
    half = max(1, round(count * share / 2))
    sums = [0.0]
    for value in series.values:
        sums.append(sums[-1] + value)
    ends = [(max(0, i - half), min(count, i + half + 1)) for i in range(count)]
    return Series(series.steps, [(sums[end] - sums[start]) / (end - start) for start, end in ends])


def spread(values: Sequence[float]) -> float:
    """The largest value by the smallest; infinite where one is not positive."""
    return max(values) / min(values) if min(values) > 0 else math.inf
