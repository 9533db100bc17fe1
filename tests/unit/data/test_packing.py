"""Laws of packing and order: each document once, no overflow, all a function of (seed, epoch, step)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.packing import SequenceOrder, pack_best_fit, split_among_ranks

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200)


@given(LENGTHS)
def test_a_pack_holds_every_document_once_and_never_overflows(lengths):
    bins = pack_best_fit(np.array(lengths), 64, np.arange(len(lengths)))
    assert Counter(i for b in bins for i in b) == Counter(range(len(lengths)))
    assert max(sum(lengths[i] for i in b) for b in bins) <= 64


@given(LENGTHS)
def test_no_two_packs_could_have_been_one(lengths):
    levels = sorted(sum(lengths[i] for i in b) for b in pack_best_fit(np.array(lengths), 64, np.arange(len(lengths))))
    assert len(levels) == 1 or levels[0] + levels[1] > 64


@given(LENGTHS, st.integers(1, 9), st.sampled_from([None, 64]), st.integers(0, 3))
def test_an_epoch_visits_every_document_once(lengths, batch_size, capacity, seed):
    order = SequenceOrder(lengths, [1.0] * len(lengths), capacity, batch_size, seed)
    seen = Counter(i for step in range(order.steps_in(0)) for sequence in order.batch(step) for i in sequence)
    assert seen == Counter(range(len(lengths)))


def test_a_step_does_not_depend_on_the_steps_computed_before():
    lengths = np.random.default_rng(0).integers(1, 100, 300).tolist()

    def make() -> SequenceOrder:
        return SequenceOrder(lengths, [1.5] * 300, 128, 4, seed=7)

    walked = make()
    in_turn = [walked.batch(step) for step in range(200)]
    assert walked.steps_in(0) < 199, "the test must cross an epoch"
    for step in (199, 0, 150, 57):
        assert make().batch(step) == in_turn[step]


def test_epochs_and_seeds_differ():
    lengths = list(range(1, 101))
    orders = {
        str(SequenceOrder(lengths, [1.0] * 100, capacity, 4, seed).epoch(epoch))
        for capacity in (None, 128)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8


@given(LENGTHS, st.integers(1, 8))
def test_ranks_split_a_step_completely_and_evenly(lengths, ranks):
    parts = split_among_ranks(lengths, ranks)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in parts)
    tokens = [sum(lengths[i] for i in part) for part in parts]
    # Longest first to the rank with the fewest tokens: the largest rank had the fewest before its last sequence.
    assert max(tokens) - min(tokens) <= max(lengths)


def test_ranks_that_hold_packs_differ_by_less_than_two_percent():
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 4000).clip(1, 1024).astype(int)
    order = SequenceOrder(lengths, np.ones(len(lengths)), 1024, 32, seed=0)
    for ranks in (2, 4, 8):
        steps = [[int(lengths[s].sum()) for s in order.batch(step)] for step in range(order.steps_in(0))]
        loads = [[sum(step[i] for i in part) for part in split_among_ranks(step, ranks)] for step in steps]
        tokens = np.array(loads).sum(axis=0)
        assert tokens.max() / tokens.mean() < 1.02


def test_weights_are_copies_and_fractions_are_drawn_anew():
    order = SequenceOrder([5] * 400, [2.5] * 200 + [1.0] * 200, None, 8, seed=1)
    counts = [Counter(i for sequence in order.epoch(e) for i in sequence) for e in (0, 1)]
    for count in counts:
        assert all(count[i] == 1 for i in range(200, 400))
        assert {count[i] for i in range(200)} == {2, 3}
        assert sum(count[i] for i in range(200)) == pytest.approx(500, abs=5 * (200 * 0.25) ** 0.5)
    assert counts[0] != counts[1]


def test_fractions_of_an_epoch_round_up_and_batches_do_not_cross_epochs():
    order = SequenceOrder([1] * 10, [1.0] * 10, None, 4, seed=0)
    assert (order.steps_in(0), order.steps_for(1), order.steps_for(1.5), order.steps_for(0.1)) == (3, 3, 5, 1)
    assert [len(order.batch(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]
