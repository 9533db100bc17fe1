"""When a teacher is asked: before each step, or once for several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from finetune.data.batch import Batch
from finetune.losses.teacher_targets import Teacher, TeacherTargets


class Schedule:
    """Asks for the signals of `steps_ahead` steps at a time, up to `total_steps`; a step's are taken as it needs them.

    A teacher that computes when it is asked (resident) is asked batch by batch all the same: it gives an iterator.
    """

    def __init__(self, teacher: Teacher, steps_ahead: int, total_steps: int):
        self.teacher, self.steps_ahead, self.total_steps = teacher, steps_ahead, total_steps
        self._counts: dict[int, int] = {}  # batches of each step that was asked about and not yet taken
        self._targets: Iterator[TeacherTargets] = iter(())

    def targets_for(self, step: int, batches_of: Callable[[int], list[Batch]]) -> Iterable[TeacherTargets]:
        """The signals of a step's batches, in order. Steps are taken one after another, each to its end."""
        if step not in self._counts:
            steps = range(step, min(step + self.steps_ahead, self.total_steps + 1))
            batches = {later: batches_of(later) for later in steps}
            self._counts = {later: len(some) for later, some in batches.items()}
            self._targets = iter(self.teacher.targets_for([batch for some in batches.values() for batch in some]))
        return islice(self._targets, self._counts.pop(step))
