"""Suggestions for the next run of a search, from Optuna's tree-structured Parzen estimator (TPE).

A suggestion is a function of the seed, the number of earlier runs and what they measured. No state is saved, so an
interrupted search resumes exactly.
Source: Bergstra et al. 2011; for several objectives Ozaki et al. 2022, JAIR 73.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.sweep.record import Trial
from finetune.sweep.space import Parameter, Space

SEED_STRIDE = 1_000_003  # neighboring seeds share no runs


def suggest(space: Space, past: Sequence[Trial], minimize: bool, seed: int) -> dict[str, str]:
    """Return the values of the next run. Runs without a metric are ignored."""
    measured = [(trial.values, (trial.metric,)) for trial in past if trial.metric is not None]
    return next(draws(space, measured, [minimize], seed * SEED_STRIDE + len(past)))


def draws(
    space: Space,
    measured: Sequence[tuple[Mapping[str, str], tuple[float, ...]]],
    minimize: Sequence[bool],
    seed: int,
) -> Iterator[dict[str, str]]:
    """Yield values of the next run without end, each as good a suggestion.

    Args:
        measured: values and objectives of each earlier run.
        minimize: whether each objective is better if it is lower.
        seed: of these draws.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    better = optuna.study.StudyDirection
    directions = [better.MINIMIZE if lower else better.MAXIMIZE for lower in minimize]
    study = optuna.create_study(directions=directions, sampler=optuna.samplers.TPESampler(seed=seed % 2**32))
    distributions = {parameter.key: _distribution(parameter) for parameter in space.parameters}
    for values, objectives in measured:
        drawn = [parameter for parameter in space.parameters if parameter.key in values]
        params = {parameter.key: _value(parameter, values[parameter.key]) for parameter in drawn}
        kinds = {key: distributions[key] for key in params}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, values=objectives))
    while True:
        params = study.ask(distributions).params
        values = {parameter.key: _override(parameter, params[parameter.key]) for parameter in space.parameters}
        yield {
            parameter.key: values[parameter.key]
            for parameter in space.parameters
            if parameter.only_with is None or values[parameter.only_with[0]] in parameter.only_with[1]
        }


def _distribution(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.ordered:  # its place in the order
        return IntDistribution(0, len(parameter.choices) - 1)
    if parameter.choices:
        return CategoricalDistribution(parameter.choices)
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.logarithmic)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.logarithmic)


def _in_order(parameter: Parameter) -> list[str]:
    return sorted(parameter.choices, key=float)


def _value(parameter: Parameter, text: str) -> Any:
    if parameter.ordered:
        return _in_order(parameter).index(text)
    if parameter.choices:
        return text
    return int(text) if parameter.whole else float(text)


def _override(parameter: Parameter, value: Any) -> str:
    """Format a value as an override; a drawn number has four digits."""
    if parameter.ordered:
        return _in_order(parameter)[value]
    if isinstance(value, float):
        value = min(max(float(f"{value:.4g}"), parameter.low), parameter.high)
    return value if isinstance(value, str) else repr(value)
