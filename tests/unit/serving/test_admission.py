"""A bounded queue says when to come back, and deadlines follow what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.command_options import ServeSettings
from finetune.serving.admission import Admission, Deadlines, Overloaded
from finetune.serving.request import Request


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def request(prompt: int = 10, answer: int = 100) -> Request:
    return Request(ids=tuple(range(1, prompt + 1)), max_tokens=answer)


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 4), st.integers(0, 4))
def test_no_more_requests_than_batch_and_queue_are_inside(moves: list[bool], batch: int, queue: int):
    admission, inside = Admission(ServeSettings(max_batch=batch, queue=queue)), 0
    for enters in moves:
        if enters:
            if inside < batch + queue:
                admission.enter()
                inside += 1
            else:
                with pytest.raises(Overloaded) as refused:
                    admission.enter()
                assert refused.value.retry_after_seconds >= 1
        elif inside:
            admission.leave()
            inside -= 1
        assert admission.count == inside <= batch + queue


@pytest.mark.parametrize(("seconds_each", "retry"), [(0.001, 1), (0.25, 10), (1.0, 40), (60.0, 60)])
def test_a_refused_client_waits_for_what_the_queue_needs_at_the_measured_rate(seconds_each: float, retry: int):
    clock = Clock()
    admission = Admission(ServeSettings(max_batch=1, queue=40), clock)
    assert admission.retry_after_seconds() == 1  # nothing measured yet
    for _ in range(600):
        admission.enter()
        clock.now += seconds_each
        admission.leave()
    assert admission.retry_after_seconds() == retry


def measured(first: float, per_token: float, settings: ServeSettings | None = None) -> Deadlines:
    deadlines = Deadlines(settings or ServeSettings(deadline_floor_seconds=0.1, deadline_seconds=1e6))
    for _ in range(100):
        deadlines.note(request(), first, 11, 10 * per_token)
    return deadlines


def test_without_history_a_request_has_the_most():
    assert Deadlines(ServeSettings()).seconds(request()) == 600


def test_a_long_answer_does_not_die_of_a_history_of_short_ones():
    deadlines = measured(first=0.5, per_token=0.1)
    assert deadlines.seconds(request(answer=4000)) == pytest.approx(4 * (0.5 + 3999 * 0.1))
    assert deadlines.seconds(request(prompt=5120, answer=1)) == pytest.approx(4 * 10 * 0.5)


def test_floor_and_ceiling_hold():
    settings = ServeSettings()
    assert measured(0.001, 0.001, settings).seconds(request()) == settings.deadline_floor_seconds
    assert measured(100, 10, settings).seconds(request()) == settings.deadline_seconds


def test_a_rare_slow_answer_is_within_the_deadline_and_a_single_one_moves_it_little():
    deadlines = measured(0.5, 0.1)
    before = deadlines.seconds(request())
    deadlines.note(request(), 500.0, 11, 1.0)
    assert deadlines.seconds(request()) == before
    for _ in range(5):
        deadlines.note(request(), 5.0, 11, 1.0)
    assert deadlines.seconds(request()) > before


def test_deadlines_follow_a_rising_load_though_requests_are_cut():
    """A request that is cut counts with the time it had; otherwise every request of a slower server would die."""
    deadlines = measured(first=0.5, per_token=0.1)
    needs = 1000.0
    for _ in range(100):
        if (given := deadlines.seconds(request(answer=1))) >= needs:
            break
        deadlines.note(request(), given, 0, 0.0)
    else:
        pytest.fail("deadlines never reached the time that requests need now")
