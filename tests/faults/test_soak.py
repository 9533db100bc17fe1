"""What grows during a long run is named."""

from __future__ import annotations

import pytest

from tests.faults.soak import Sample, judge

STEPS, MIB = 1000, 2**20


def samples(memory: float = 0.0, files: float = 0.0, seconds: float = 0.0) -> list[Sample]:
    """Samples of a run every ten steps; each quantity grows by this share from its start to its end."""
    found, cpu = [], 0.0
    for step in range(1, STEPS + 1, 10):
        done = step / STEPS
        cpu += 0.1 * (1 + seconds * done)
        found.append(Sample(step, int(500 * MIB * (1 + memory * done)), round(10 * (1 + files * done)), 1, cpu))
    return found


@pytest.mark.parametrize(
    ("growth", "named"),
    [({}, []), ({"memory": 0.2}, ["memory"]), ({"files": 0.5}, ["files"]), ({"seconds": 0.5}, ["time"])],
    ids=["flat", "memory", "files", "time"],
)
def test_what_grows_is_named(growth, named):
    figures = judge(samples(**growth), [0.01] * STEPS)
    assert (figures["grew"], figures["lost"]) == (named, len(named))


def test_too_few_steps_are_no_verdict():
    with pytest.raises(ValueError, match="too few"):
        judge(samples()[:1], [0.01] * 3)
