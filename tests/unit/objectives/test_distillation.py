"""A schedule requests targets once for several steps, in order, and not earlier."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from finetune.objectives.distillation import Schedule

BATCHES = {1: ["1a", "1b"], 2: ["2a"], 3: ["3a", "3b", "3c"], 4: ["4a"], 5: ["5a"]}


class Echo:
    """Returns each batch's name; records the requests, and the targets taken."""

    def __init__(self) -> None:
        self.requested: list[list[str]] = []
        self.taken: list[str] = []

    def targets_for(self, batches: list) -> Iterator:
        self.requested.append(list(batches))
        for batch in batches:
            self.taken.append(batch)
            yield batch


@pytest.mark.parametrize(
    ("ahead", "requested"),
    [
        (1, [["1a", "1b"], ["2a"], ["3a", "3b", "3c"], ["4a"], ["5a"]]),
        (2, [["1a", "1b", "2a"], ["3a", "3b", "3c", "4a"], ["5a"]]),
        (9, [["1a", "1b", "2a", "3a", "3b", "3c", "4a", "5a"]]),
    ],
)
def test_each_step_gets_its_targets_and_none_beyond_the_last_is_requested(ahead, requested):
    teacher = Echo()
    schedule = Schedule(teacher, ahead, total_steps=5)
    for step, batches in BATCHES.items():
        assert list(schedule.targets_for(step, BATCHES.__getitem__)) == batches
    assert teacher.requested == requested


def test_a_resumed_run_begins_at_its_step():
    teacher = Echo()
    schedule = Schedule(teacher, 2, total_steps=5)
    assert [list(schedule.targets_for(step, BATCHES.__getitem__)) for step in (4, 5)] == [["4a"], ["5a"]]
    assert teacher.requested == [["4a", "5a"]]


def test_a_teacher_that_computes_on_demand_goes_batch_by_batch():
    teacher = Echo()
    targets_for = iter(Schedule(teacher, 1, total_steps=5).targets_for(3, BATCHES.__getitem__))
    assert teacher.taken == []
    next(targets_for)
    assert teacher.taken == ["3a"]
