"""Intervals: what the resamples are of, that models share them, and that they hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.evaluation.intervals import Bootstrap, difference_of_shares, share_of


def rows(seed: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of rows of unequal length."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, 40, count)
    return draw.gamma(2.0, 0.5, count) * tokens, tokens


def test_a_ratio_is_resampled_row_by_row():
    sums, tokens = rows(0, 30)
    bootstrap = Bootstrap(30, 50, seed=3)
    figure = bootstrap.ratio(sums, tokens)
    drawn = np.random.default_rng(3)
    picks = [drawn.integers(30, size=30) for _ in range(50)]
    assert figure.value == pytest.approx(sums.sum() / tokens.sum())
    np.testing.assert_allclose(figure.resampled_B, [sums[pick].sum() / tokens[pick].sum() for pick in picks])


def test_a_percentile_is_that_of_the_resampled_rows_tokens():
    draw = np.random.default_rng(1)
    row_N = np.repeat(np.arange(40), draw.integers(1, 300, 40))
    # Ties, and rows so unlike each other that the resamples' percentiles lie far apart.
    values_N = np.round(draw.exponential(1 + row_N % 7), 1)
    figure = Bootstrap(40, 60, seed=5).quantile(values_N, row_N, 0.99)
    drawn = np.random.default_rng(5)
    expected = [
        np.quantile(
            np.concatenate([values_N[row_N == row] for row in drawn.integers(40, size=40)]), 0.99, method="inverted_cdf"
        )
        for _ in range(60)
    ]
    assert figure.value == np.quantile(values_N, 0.99, method="inverted_cdf")
    np.testing.assert_array_equal(figure.resampled_B, expected)


def test_a_difference_on_the_same_rows_knows_no_more_noise_than_there_is():
    sums, tokens = rows(2)
    bootstrap = Bootstrap(200, 500, seed=0)
    one, other = bootstrap.ratio(sums, tokens), bootstrap.ratio(sums + 0.25 * tokens, tokens)
    difference = (other - one).estimate()
    assert (difference.low, difference.high) == pytest.approx((0.25, 0.25))
    alone = one.estimate()
    assert alone.high - alone.low > 0.1


def test_95_percent_intervals_hold_the_truth_about_that_often():
    # 300 binomial draws at 0.95 lie in [0.90, 0.99] but for 1 in 4,000; the percentile bootstrap is a little narrow.
    hits = 0
    for seed in range(300):
        sums, tokens = rows(seed, 100)
        found = Bootstrap(100, 400, seed).ratio(sums, tokens).estimate()
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 300 <= 0.99


def test_a_share_of_rows_is_never_certain():
    bootstrap = Bootstrap(20, 200, 0)
    all_right = np.ones(20)
    found = share_of(all_right, bootstrap.ratio(all_right, all_right))
    # Wilson's lower end for n of n is n / (n + z^2).
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 20 / (20 + 1.959964**2), 1.0))


def test_a_score_that_is_no_share_is_resampled():
    values = np.linspace(0, 3, 20)
    figure = Bootstrap(20, 200, 0).ratio(values, np.ones(20))
    assert share_of(values, figure) == figure.estimate()


def matched(draw: np.random.Generator, count: int, gain: float, loss: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two models on the same rows; `gain` of them only the first gets right, `loss` only the second."""
    kind = draw.choice(4, size=count, p=[gain, loss, (1 - gain - loss) / 2, (1 - gain - loss) / 2])
    return np.isin(kind, (0, 2)).astype(float), np.isin(kind, (1, 2)).astype(float)


@pytest.mark.parametrize(("gain", "loss"), [(0.02, 0.0), (0.1, 0.05), (0.6, 0.02)])
def test_intervals_of_differences_of_shares_hold_the_truth_about_that_often(gain, loss):
    # 400 binomial draws at 0.95 lie above 0.912 but for 1 in 2,000. Bootstrap alone: 0.63 in the first case, by [0, 0].
    bootstrap, hits = Bootstrap(50, 100, 0), 0
    for seed in range(400):
        one, other = matched(np.random.default_rng(seed), 50, gain, loss)
        figure = bootstrap.ratio(one, np.ones(50)) - bootstrap.ratio(other, np.ones(50))
        found = difference_of_shares(one, other, figure)
        assert -1 <= found.low <= found.value <= found.high <= 1
        hits += found.low <= gain - loss <= found.high
    assert hits / 400 >= 0.912


def test_models_that_are_right_on_the_same_rows_are_not_certainly_the_same():
    half = np.repeat([0.0, 1.0], 20)
    bootstrap = Bootstrap(40, 100, 0)
    figure = bootstrap.ratio(half, np.ones(40)) - bootstrap.ratio(half, np.ones(40))
    found = difference_of_shares(half, half, figure)
    # Agresti and Min with nothing gained or lost: 1.96 / (n + 2) to each side.
    assert (found.value, found.low, found.high) == pytest.approx((0, -1.959964 / 42, 1.959964 / 42))
    # Less than the two shares' own intervals leave open: the rows are the same.
    alone = share_of(half, bootstrap.ratio(half, np.ones(40)))
    assert found.high - found.low < 0.5 * (alone.high - alone.low)
    scores = half + 0.25
    assert difference_of_shares(scores, scores, figure) == figure.estimate()
