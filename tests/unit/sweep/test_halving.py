"""Trials go on by Pareto rank; all steps together stay within the budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.sweep.halving import in_order, next_trial, pareto_front, pareto_ranks, plan_halving
from finetune.sweep.limits import Prediction
from finetune.sweep.record import Trial


def trial(number: int, until: int, rungs: dict[int, float], stored: float = 1.0, **more) -> Trial:
    return Trial(
        number,
        {"lora.rank": str(number)},
        "paused",
        until=until,
        rungs=rungs,
        plan=Prediction(1.0, 1.0, stored),
        **more,
    )


@given(st.integers(1, 400), st.floats(1, 60))
def test_the_steps_of_a_halving_are_within_the_budget_and_no_trial_more_would_be(steps: int, budget: float):
    halving = plan_halving(steps, budget)
    assert halving.rungs[-1] == steps and list(halving.rungs) == sorted(set(halving.rungs))
    assert list(halving.counts) == sorted(halving.counts, reverse=True) and halving.counts[-1] >= 1
    assert halving.steps <= budget * steps
    assert halving.steps + steps > budget * steps


def test_twelve_full_runs_are_the_first_quarter_of_24_trials():
    assert plan_halving(60, 12) == plan_halving(60, 12.2)
    assert (plan_halving(60, 12).rungs, plan_halving(60, 12).counts) == ((15, 30, 60), (24, 12, 6))


def test_rungs_are_multiples_of_what_decides_about_the_end_of_a_run():
    assert plan_halving(60, 4, 20).rungs == (20, 40, 60)
    assert plan_halving(60, 4, 50).rungs == (50, 60)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=14))
def test_a_point_of_rank_n_is_dominated_by_one_of_rank_n_minus_1_and_by_none_of_its_own(points):
    def dominates(a, b):
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    ranks = pareto_ranks(points)
    for i, rank in enumerate(ranks):
        above = {ranks[j] for j in range(len(points)) if dominates(points[j], points[i])}
        assert (max(above) if above else -1) == rank - 1


def test_within_a_rank_the_better_metric_goes_on_first_and_the_direction_counts():
    trials = [
        trial(1, 4, {4: 3.0}, 1.0),
        trial(2, 4, {4: 1.0}, 9.0),
        trial(3, 4, {4: 2.0}, 10.0),
        trial(4, 4, {4: 3.0}, 1.0),
    ]
    assert [t.number for t in in_order(trials, 4, minimize=True)] == [2, 1, 4, 3]
    assert [t.number for t in in_order(trials, 4, minimize=False)] == [1, 4, 3, 2]


def test_an_unfinished_part_comes_first_then_new_trials_then_promotions():
    halving = plan_halving(8, 2)  # 4 trials to step 2, 2 to step 4, 1 to step 8
    assert (halving.rungs, halving.counts) == ((2, 4, 8), (4, 2, 1))
    trials = [trial(i, 2, {2: float(i)}) for i in (1, 2, 3)]
    assert next_trial(trials, halving, True, exhausted=False) is None
    trials.append(trial(4, 2, {}))
    assert next_trial(trials, halving, True, exhausted=False) is trials[3]
    trials[3].rungs[2] = 0.5
    order = []
    while (best := next_trial(trials, halving, True, exhausted=False)) is not None:
        order.append((best.number, best.until))
        best.rungs[best.until] = best.rungs[2]
    assert order == [(4, 4), (1, 4), (4, 8)]


def test_a_failed_trial_takes_its_place_and_does_not_go_on():
    halving = plan_halving(8, 2)
    trials = [trial(i, 2, {2: float(i)}) for i in (1, 2, 3, 4)]
    first = next_trial(trials, halving, True, exhausted=False)
    assert first is trials[0]
    first.status = "failed"
    assert next_trial(trials, halving, True, exhausted=False) is trials[1]
    trials[1].rungs[4] = 2.0
    assert next_trial(trials, halving, True, exhausted=False) is trials[1] and trials[1].until == 8


@pytest.mark.parametrize(("minimize", "front"), [(True, [2, 1]), (False, [1])])
def test_the_front_has_full_runs_alone_and_the_best_metric_first(minimize: bool, front: list[int]):
    trials = [
        trial(1, 8, {2: 9.0, 8: 3.0}, 1.0, metric=3.0),
        trial(2, 8, {2: 9.0, 8: 1.0}, 9.0, metric=1.0),
        trial(3, 8, {2: 9.0, 8: 2.0}, 10.0, metric=2.0),
        trial(4, 4, {2: 0.1}, 0.1),
    ]
    assert [t.number for t in pareto_front(trials, minimize)] == front
