"""Differential privacy of the updates that a party sends: epsilon of their Gaussian noise, by Google's dp-accounting.

What is protected is the party with all its rows (client-level privacy), not a row. This is not DP-SGD, which adds noise
to clipped gradients of single rows in every step.
"""

from __future__ import annotations

import math

from finetune.system.errors import MissingExtra

# Less noise than this, for one update, has an epsilon above 280. The accountant would need minutes to compute it.
_LEAST_NOISE = 0.1
# Step of the accountant's grid, in nats. It rounds up: epsilon is a bound, at most so much too large.
_GRID_NATS = 1e-3


def epsilon(noise: float, rounds: int, delta: float) -> float:
    """Return epsilon of a party that sends clipped updates with Gaussian noise.

    Neighbors differ in the whole dataset of the party (replace-one), which moves a clipped update by 2 * max_norm at
    most. An update may depend on everything that was sent before.

    Args:
        noise: standard deviation of the noise of each value, in units of max_norm.
        rounds: number of updates that the party sends.
        delta: probability with which the bound may fail.

    Returns:
        Epsilon in nats; infinity where it exceeds 280, which protects nothing.

    Raises:
        MissingExtra: dp-accounting is not installed.

    Source: Balle and Wang 2018, arXiv:1805.06530; Koskela et al. 2020, arXiv:1906.03049.
    """
    try:
        from dp_accounting import GaussianDpEvent, NeighboringRelation, SelfComposedDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError as error:
        raise MissingExtra('delta= needs: pip install "finetune-qlora[federated]"') from error
    if noise < _LEAST_NOISE * math.sqrt(rounds):
        return math.inf
    # The accountant takes noise in units of max_norm too, and doubles the sensitivity under replace-one.
    accountant = PLDAccountant(NeighboringRelation.REPLACE_ONE, value_discretization_interval=_GRID_NATS)
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(noise), rounds))
    return float(accountant.get_epsilon(delta))
