"""Request a teacher's targets for one or several steps at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from finetune.data.batch import Batch
from finetune.losses.distillation import Teacher, TeacherTargets


class Schedule:
    """Request the targets of `steps_ahead` steps at a time, up to `total_steps`.

    A resident teacher still computes batch by batch, because it returns an iterator.
    """

    def __init__(self, teacher: Teacher, steps_ahead: int, total_steps: int):
        self.teacher, self.steps_ahead, self.total_steps = teacher, steps_ahead, total_steps
        self._counts: dict[int, int] = {}  # batches of each requested step that is still to come
        self._targets: Iterator[TeacherTargets] = iter(())

    def targets_for(self, step: int, batches_of: Callable[[int], list[Batch]]) -> Iterable[TeacherTargets]:
        """Return the targets of a step's batches, in order. Callers take all targets of each step, step by step."""
        if step not in self._counts:
            steps = range(step, min(step + self.steps_ahead, self.total_steps + 1))
            batches = {later: batches_of(later) for later in steps}
            self._counts = {later: len(some) for later, some in batches.items()}
            self._targets = iter(self.teacher.targets_for([batch for some in batches.values() for batch in some]))
        return islice(self._targets, self._counts.pop(step))
