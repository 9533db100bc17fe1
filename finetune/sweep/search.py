"""The search of `sweep.space=auto`: candidates within limits, halved by their Pareto ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import NamedTuple

from finetune.config.command_options import SweepSettings
from finetune.config.compose import load_config
from finetune.config.overrides import parse_overrides
from finetune.config.schema import RunConfig
from finetune.data.early_checks import check_inputs
from finetune.models.families import FAMILIES
from finetune.planning.gpus import planned_device
from finetune.planning.inputs import known_shape
from finetune.planning.timing import read_rates
from finetune.sweep.auto_space import AutoSpace, auto_space, packing_lengths
from finetune.sweep.halving import Halving, next_trial, objectives, plan_halving
from finetune.sweep.limits import Limits, Planner, Prediction
from finetune.sweep.record import Record, Trial
from finetune.sweep.space import Space
from finetune.sweep.suggest import SEED_STRIDE, draws
from finetune.system.console import Log
from finetune.system.errors import ConfigError

DEFAULT_BUDGET = 12.0
_MOST_DRAWS = 100
_MOST_FAILURES = 3
_DRAWS_SHOWN = 8


class Candidate(NamedTuple):
    """A draw within the limits. over_limits: draws before it that were not."""

    values: dict[str, str]
    plan: Prediction
    over_limits: int


@dataclass(frozen=True)
class Search:
    """A search around the config `config` (a file's name).

    Attributes:
        total_steps: of a full run.
        minimize: whether a lower metric is better.
    """

    config: str
    space: AutoSpace
    planner: Planner
    limits: Limits
    halving: Halving
    total_steps: int
    minimize: bool
    seed: int

    def with_memory(self, memory_bytes: float | None) -> Search:
        """Return the search with another limit of memory."""
        planner = replace(self.planner, device=self.planner.device._replace(free_bytes=memory_bytes))
        return replace(self, planner=planner, limits=replace(self.limits, memory_bytes=memory_bytes))

    def next(self, record: Record) -> Trial | None:
        """Return the trial that runs next, which may be a new one of the record; None at the end of the search."""
        trials, most = record.trials, self.halving.counts[0]
        if len(trials) >= _MOST_FAILURES and all(trial.status == "failed" for trial in trials):
            return None
        if (trial := next_trial(trials, self.halving, self.minimize, record.exhausted)) or len(trials) >= most:
            return trial
        drawn = None if record.exhausted else self.draw(trials)
        if drawn is None:
            already, record.exhausted = record.exhausted, True
            return None if already else self.next(record)
        first = self.halving.rungs[0]
        trials.append(Trial(len(trials) + 1, drawn.values, until=first, plan=drawn.plan, over_limits=drawn.over_limits))
        return trials[-1]

    def draw(self, trials: list[Trial]) -> Candidate | None:
        """Return a new candidate within the limits, the config itself first; None if no draw gives one.

        The sampler learns from the metrics at the first rung, which all trials have, and from the stored bytes.
        """
        for over, (values, found) in enumerate(self._predicted(trials)):
            if not self.limits.broken_by(found):
                return Candidate(values, found, over)
        return None

    def check(self) -> None:
        """Raise ConfigError if no candidate is within the limits."""
        found: list[Prediction] = []
        for _, plan in self._predicted([]):
            if not self.limits.broken_by(plan):
                return
            found.append(plan)
        keys = set.intersection(*(set(self.limits.broken_by(each)) for each in found))
        least = Prediction(
            min(each.needed_bytes for each in found),
            min(each.seconds or 0.0 for each in found),
            min(each.stored_bytes for each in found),
        )
        text = f"no candidate is within {self.limits}; the least of {len(found)} draws: {least}"
        advice = "help: raise it, or give keys that need less, as data.max_length"
        named = sorted(keys or {"sweep.memory_gb", "sweep.hours"})
        raise ConfigError("\n".join([*(f"{key}: {text}" for key in named), advice]))

    def _predicted(self, trials: list[Trial]) -> Iterator[tuple[dict[str, str], Prediction]]:
        """Yield draws that no trial has, each with what the planner predicts."""
        known = {tuple(self.space.words(trial.values)) for trial in trials}
        for values in islice(self._draws(trials), _MOST_DRAWS):
            if (words := tuple(self.space.words(values))) not in known:
                known.add(words)
                yield values, self.predict(values)

    def _draws(self, trials: list[Trial]) -> Iterator[dict[str, str]]:
        first = self.halving.rungs[0]
        measured = [(t.values, objectives(t, first, self.minimize)) for t in trials if first in t.rungs]
        drawn = draws(self.space, measured, [True, True], self.seed * SEED_STRIDE + len(trials))
        return drawn if trials or self.space.start is None else chain([dict(self.space.start)], drawn)

    def describe(self) -> Iterator[str]:
        """Yield the space, the limits, the budget, and the first draws with what the planner predicts."""
        yield from (parameter.describe() for parameter in self.space.parameters)
        yield f"limits of a run: {self.limits}"
        yield self.halving.describe()
        over, fitting = 0, []
        for values in islice(self._draws([]), _DRAWS_SHOWN):
            found = self.predict(values)
            if self.limits.broken_by(found):
                over += 1
            else:
                fitting.append(f"  {' '.join(f'{key}={value}' for key, value in values.items())}: {found}")
        yield f"draws: {_DRAWS_SHOWN}, over a limit: {over}"
        yield from fitting

    def config_of(self, values: Mapping[str, str]) -> RunConfig:
        """Return the config of a full run with these values."""
        return load_config(self.config, [*self.space.fixed, *self.space.words(values)])

    def predict(self, values: Mapping[str, str]) -> Prediction:
        """Return what the planner predicts of a full run with these values."""
        return self.planner.predict(self.config_of(values))


def plan_search(
    config: str, given: Space, cfg: RunConfig, settings: SweepSettings, *, minimize: bool, log: Log
) -> Search:
    """Read the rows and the model of a config, and build the search around it.

    Args:
        given: the fixed overrides and the parameters of the command line.
        cfg: the config with the fixed overrides.

    Raises:
        ConfigError: the model's sizes are unknown.
        DataError: a row is wrong.
    """
    check_inputs(cfg)
    shape = known_shape(cfg.model.name)
    rows = _read_rows(cfg, log)
    edits = parse_overrides(given.fixed)
    keys = {key for key, _ in edits.values} | {parameter.key for parameter in given.parameters}
    if cfg.train.max_steps is None:
        given = replace(given, fixed=(*given.fixed, f"train.max_steps={rows.steps}", "train.epochs=null"))
    space = auto_space(cfg, given, keys, FAMILIES[shape["model_type"]], rows.lengths)
    device = planned_device(None, None)
    planner = Planner(shape, device, read_rates(device.kind), rows.document_tokens, rows.target_share)
    seconds = None if settings.hours is None else settings.hours * 3600
    every = cfg.train.eval_every if cfg.train.early_stopping or cfg.guard.max is not None else cfg.reward.updates
    halving = plan_halving(rows.steps, settings.budget or DEFAULT_BUDGET, every or 1)
    limits = Limits(device.free_bytes, seconds)
    search = Search(config, space, planner, limits, halving, rows.steps, minimize, settings.seed)
    if settings.memory_gb is not None:
        search = search.with_memory(settings.memory_gb * 1e9)
    return search


class _Rows(NamedTuple):
    """What the search reads from the rows. lengths: packing lengths to choose from. steps: of a full run."""

    steps: int
    document_tokens: int | None = None
    target_share: float = 1.0
    lengths: Sequence[int] = ()


def _read_rows(cfg: RunConfig, log: Log) -> _Rows:
    """Read the rows, unless they are streamed: their lengths, and the steps of train.epochs."""
    steps = cfg.train.max_steps
    if steps is None and cfg.reward.loss != "none":
        raise ConfigError("train.max_steps: sweep.space=auto counts steps, which a run with rewards must name; set it")
    if cfg.data.stream_rows is not None:
        return _Rows(steps or 0)
    from finetune.data.loader import load_all_rows
    from finetune.data.packing import SequenceOrder

    *_, data = load_all_rows(cfg, log)
    documents, pack_to = data.documents, cfg.data.max_length if cfg.data.packing else None
    if steps is None:
        order = SequenceOrder(documents.lengths, data.weights, pack_to, cfg.train.batch_size, cfg.train.seed)
        steps = order.steps_for(cfg.train.epochs or 1)
    tokens = int(documents.lengths.sum())
    mean, share = round(tokens / len(documents)), max(1, int(documents.targets.sum())) / tokens
    # Other lengths must not change which held-out rows count.
    cut = any((source.store.lengths[source.rows] > cfg.data.max_length).any() for source in data.eval)
    varies = cfg.data.packing and cfg.reward.loss == "none" and not cut
    longest = int(data.every_document.lengths.max())
    return _Rows(steps, mean, share, packing_lengths(cfg, longest) if varies else [])
