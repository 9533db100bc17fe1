"""Successive halving over two objectives: which trial runs next, and to which step. Pure functions of the record.

All candidates train to the first rung, the better part of them goes on to the next, and so on to the last step. A
trial that goes on continues from its checkpoint, with the learning rates of the full run.
Source: Karnin, Koren and Somekh 2013 (successive halving); Jamieson and Talwalkar 2016, arXiv:1502.07943.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.sweep.record import Trial

FACTOR = 2  # one of so many trials goes on
_SHARES = (1 / 4, 1 / 2, 1)


@dataclass(frozen=True)
class Halving:
    """The rungs of a search, and how many trials reach each of them.

    Attributes:
        rungs: steps, ascending; the last is that of a full run.
        counts: trials that train to each rung.
    """

    rungs: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Steps that all trials train together."""
        gained = (step - before for step, before in zip(self.rungs, (0, *self.rungs), strict=False))
        return sum(count * steps for count, steps in zip(self.counts, gained, strict=True))

    def describe(self) -> str:
        parts = (f"{count} to step {step}" for count, step in zip(self.counts, self.rungs, strict=True))
        return f"trials: {', '.join(parts)} (together {self.steps} steps)"


def plan_halving(total_steps: int, budget: float, every: int = 1) -> Halving:
    """Return the halving with the most trials whose steps are within `budget` full runs.

    Args:
        total_steps: of a full run.
        budget: at least 1.
        every: rungs are multiples of it, as evaluations are that decide about the end of a run.
    """
    early = {round(share * total_steps / every) * every for share in _SHARES[:-1]}
    rungs = (*sorted(step for step in early if 0 < step < total_steps), total_steps)
    found = Halving(rungs, (1,) * len(rungs))
    while (larger := _with_trials(rungs, found.counts[0] + 1)).steps <= budget * total_steps:
        found = larger
    return found


def _with_trials(rungs: tuple[int, ...], trials: int) -> Halving:
    return Halving(rungs, tuple(max(1, trials // FACTOR**level) for level in range(len(rungs))))


def next_trial(trials: Sequence[Trial], halving: Halving, minimize: bool, exhausted: bool) -> Trial | None:
    """Return the trial that trains next, with `until` set to its rung; None: a new one, or the end of the search.

    An unfinished part of a trial comes first. Once all candidates have reached the first rung, trials go on, rung by
    rung. Trials that fail do not go on. exhausted: no new trial can be drawn.
    """
    for trial in trials:
        if trial.status != "failed" and trial.until not in trial.rungs:
            return trial
    if len(trials) < halving.counts[0] and not exhausted:
        return None
    for before, step, count in zip(halving.rungs, halving.rungs[1:], halving.counts[1:], strict=False):
        there = [trial for trial in trials if before in trial.rungs]
        waiting = [trial for trial in there if trial.until == before and trial.status != "failed"]
        if waiting and len(there) - len(waiting) < count:
            first = next(trial for trial in in_order(there, before, minimize) if trial in waiting)
            first.until = step
            return first
    return None


def in_order(trials: Sequence[Trial], step: int, minimize: bool) -> list[Trial]:
    """Sort trials by their Pareto rank over the metric at a rung and the stored bytes; within a rank by the metric."""
    points = [objectives(trial, step, minimize) for trial in trials]
    ranks = pareto_ranks(points)
    order = sorted(range(len(trials)), key=lambda i: (ranks[i], points[i], trials[i].number))
    return [trials[i] for i in order]


def pareto_front(trials: Sequence[Trial], minimize: bool) -> list[Trial]:
    """Return the full runs of a search that no other one dominates, the best metric first."""
    full = [trial for trial in trials if trial.metric is not None and trial.plan is not None]
    points = [objectives(trial, max(trial.rungs), minimize) for trial in full]
    front = [
        (point, trial.number, trial)
        for point, trial, rank in zip(points, full, pareto_ranks(points), strict=True)
        if rank == 0
    ]
    return [trial for *_, trial in sorted(front, key=lambda each: each[:2])]


def objectives(trial: Trial, step: int, minimize: bool) -> tuple[float, float]:
    """Return the metric at a rung, negative if more is better, and the stored bytes: both better if lower."""
    metric = trial.rungs[step]
    return metric if minimize else -metric, 0.0 if trial.plan is None else trial.plan.stored_bytes


def pareto_ranks(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the rank of each point by non-dominated sorting: 0 is the front, 1 the front of the others, and so on.

    A point dominates another one if it is nowhere worse and somewhere better. Lower is better.
    Source: Deb et al. 2002, NSGA-II.
    """
    ranks, left, rank = [0] * len(points), set(range(len(points))), 0
    while left:
        front = {i for i in left if not any(_dominates(points[j], points[i]) for j in left)}
        for i in front:
            ranks[i] = rank
        left, rank = left - front, rank + 1
    return ranks


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] <= b[1]
