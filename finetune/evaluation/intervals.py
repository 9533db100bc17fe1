"""95 % confidence intervals of figures, and of differences between models on the same rows.

Shapes: R rows, N tokens, B resamples.
Sources: the percentile bootstrap (Efron 1979) over rows, because tokens of a row are not independent. Resamples of rows
that are all right have no spread. So shares use Wilson's interval (1927), and differences of shares on the same rows
that of Agresti and Min (2005).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_CONFIDENCE = 0.95
# Half-width of the central 95 % of a normal distribution, in standard deviations.
NORMAL_95 = 1.959964
# Values of a block of resamples: 64 MB in float64.
_BLOCK_VALUES = 1 << 23


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """A figure, and its value in each resample [B]. Figures of one `Bootstrap` are paired: they share the draws."""

    value: float
    resampled_B: np.ndarray

    def __sub__(self, other: Figure) -> Figure:
        return Figure(self.value - other.value, self.resampled_B - other.resampled_B)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Figure:
        """Apply a function of arrays."""
        return Figure(float(function(np.array(self.value))), function(self.resampled_B))

    def estimate(self) -> Estimate:
        """Return the figure with the 2.5th and 97.5th percentiles of its resamples."""
        tail = (1 - _CONFIDENCE) / 2
        low, high = np.quantile(self.resampled_B, [tail, 1 - tail])
        return Estimate(self.value, float(low), float(high))


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of R rows with replacement; a seed gives the same resamples for every model."""

    rows: int
    resamples: int
    seed: int

    @cached_property
    def _counts_BR(self) -> np.ndarray:
        draw = np.random.default_rng(self.seed)
        counts = np.empty((self.resamples, self.rows), np.uint16)
        for resample in counts:
            resample[:] = np.bincount(draw.integers(self.rows, size=self.rows), minlength=self.rows)
        return counts

    def ratio(self, sums_R: np.ndarray, weights_R: np.ndarray) -> Figure:
        """Divide the total of `sums_R` by that of `weights_R`: nats per token, or a mean if all weights are 1."""
        both_R2 = np.stack([sums_R, weights_R], 1).astype(np.float64)
        step = max(1, _BLOCK_VALUES // self.rows)
        blocks = [self._counts_BR[start : start + step] for start in range(0, self.resamples, step)]
        totals_B2 = np.concatenate([counts.astype(np.float64) @ both_R2 for counts in blocks])
        return Figure(float(sums_R.sum() / weights_R.sum()), totals_B2[:, 0] / totals_B2[:, 1])

    def quantile(self, values_N: np.ndarray, row_N: np.ndarray, share: float) -> Figure:
        """Return the smallest value with at least this share of tokens at or below it. row_N: the row of each token."""
        tokens_R = np.bincount(row_N, minlength=self.rows)
        # Try the highest values first, enough for nearly every resample: a sum over all tokens is slow.
        order = np.argsort(-values_N, kind="stable")
        highest = order[: int(4 * (1 - share) * len(order)) + 1000]

        def smallest(counts_R: np.ndarray) -> float:
            total = int(counts_R @ tokens_R)
            above = total - math.ceil(share * total - 1e-9)
            for part in (highest, order):
                reached = np.cumsum(counts_R[row_N[part]], dtype=np.int64)
                if reached[-1] > above:
                    return float(values_N[part[np.searchsorted(reached, above, side="right")]])
            raise AssertionError("all tokens are more than some of them")

        resampled = [smallest(counts_R.astype(np.int64)) for counts_R in self._counts_BR]
        return Figure(smallest(np.ones(self.rows, np.int64)), np.array(resampled))


def share_of(values_R: np.ndarray, figure: Figure) -> Estimate:
    """Return the mean of a score with its interval: Wilson's if every row scores 0 or 1, else the bootstrap's."""
    if not np.isin(values_R, (0, 1)).all():
        return figure.estimate()
    from scipy.stats import binomtest

    found = binomtest(int(values_R.sum()), len(values_R)).proportion_ci(_CONFIDENCE, method="wilson")
    return Estimate(figure.value, float(found.low), float(found.high))


def difference_of_shares(values_R: np.ndarray, reference_R: np.ndarray, difference: Figure) -> Estimate:
    """Return the difference of a score from the reference's on the same rows, with its interval.

    Agresti and Min's if every row scores 0 or 1: it adds half a row to each of the four outcomes. Else the bootstrap's.
    """
    if not np.isin([values_R, reference_R], (0, 1)).all():
        return difference.estimate()
    gained, lost = float((values_R > reference_R).sum()) + 0.5, float((values_R < reference_R).sum()) + 0.5
    rows = len(values_R) + 2.0
    middle = (gained - lost) / rows
    half = NORMAL_95 * math.sqrt(gained + lost - (gained - lost) ** 2 / rows) / rows
    return Estimate(difference.value, max(-1.0, middle - half), min(1.0, middle + half))
