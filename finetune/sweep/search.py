"""Suggest the next settings with Optuna's tree-structured Parzen estimator (Bergstra et al. 2011).

The suggestion for the n-th run is a function of the seed, n and the metrics of the runs before. No state is saved, so
an interrupted search resumes exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.sweep.record import Trial
from finetune.sweep.space import Parameter, Space
from finetune.system.errors import MissingExtra

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_SEED_STRIDE = 1_000_003  # neighboring seeds share no runs


def check_optuna() -> None:
    """Raise MissingExtra, with the command that installs Optuna."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise MissingExtra('sweep.trials: needs Optuna\nhelp: pip install "finetune-qlora[sweep]"') from error


def suggest(space: Space, past: Sequence[Trial], minimize: bool, seed: int) -> dict[str, str]:
    """Return the override texts by key for the next run; runs without a metric are ignored."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=(seed * _SEED_STRIDE + len(past)) % 2**32)
    study = optuna.create_study(direction="minimize" if minimize else "maximize", sampler=sampler)
    distributions = {parameter.key: _distribution(parameter) for parameter in space.parameters}
    for trial in past:
        if trial.metric is not None:
            values = {parameter.key: _value(parameter, trial.values[parameter.key]) for parameter in space.parameters}
            study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=trial.metric))
    trial = study.ask(distributions)
    return {parameter.key: _typed(parameter, trial.params[parameter.key]) for parameter in space.parameters}


def _typed(parameter: Parameter, value: Any) -> str:
    """Format a value as an override; a drawn number has four digits."""
    if isinstance(value, float):
        value = min(max(float(f"{value:.4g}"), parameter.low), parameter.high)
    return value if isinstance(value, str) else repr(value)


def _distribution(parameter: Parameter) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.step is not None:
        numbers = sorted(map(int, parameter.choices))
        return IntDistribution(numbers[0], numbers[-1], step=abs(parameter.step))
    if parameter.choices:
        return CategoricalDistribution(parameter.choices)
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.logarithmic)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.logarithmic)


def _value(parameter: Parameter, text: str) -> Any:
    if parameter.step is not None or (parameter.whole and not parameter.choices):
        return int(text)
    return text if parameter.choices else float(text)
