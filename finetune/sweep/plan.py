"""Read what varies in a sweep, and check every combination before the first run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from finetune.config.command_options import SweepSettings
from finetune.config.compose import load_config
from finetune.config.schema import RunConfig
from finetune.evaluation.metric_names import ANSWER_METRICS
from finetune.report.facts import FIGURES, figure_named
from finetune.sweep.record import Record, Trial
from finetune.sweep.search import Search, plan_search
from finetune.sweep.space import Space, read_space
from finetune.system.console import Log
from finetune.system.errors import ConfigError, MissingExtra
from finetune.system.format import first_lines

_SHOWN_PROBLEMS = 10
_NEEDS_OPTUNA = 'needs Optuna\nhelp: pip install "finetune-qlora[sweep]"'
_ALSO_BEFORE_THE_END = "set generation.metrics=[exact_match] and sweep.metric=eval/SET/exact_match"
METRICS = sorted(figure.name for figure in FIGURES if figure.lower_is_better is not None)


@dataclass(frozen=True)
class Plan:
    """A sweep whose combinations are all valid.

    Attributes:
        first: the config of one of them.
        search: with `sweep.space=auto`.
    """

    config: str
    space: Space
    settings: SweepSettings
    first: RunConfig
    search: Search | None = None

    @property
    def folder(self) -> Path:
        return Path(self.settings.out or f"outputs/{self.first.name}-sweep").expanduser()

    @property
    def minimize(self) -> bool:
        return minimizes(self.settings)

    @property
    def runs(self) -> int:
        """Runs without `sweep.space=auto`."""
        return self.settings.trials or self.space.combinations

    @property
    def size(self) -> str:
        return f"{self.runs} runs" if self.search is None else self.search.halving.describe()

    def headline(self, record: Record) -> str:
        """Return what became of the runs."""
        finished = sum(trial.status == "finished" for trial in record.trials)
        text = f"{len(record.trials)} runs, {finished} finished"
        if self.search is None:
            return text
        limits = replace(self.search.limits, memory_bytes=record.memory_bytes)
        over = sum(trial.over_limits for trial in record.trials)
        steps = sum(max(trial.rungs, default=0) for trial in record.trials)
        return f"{text}, {steps:,} steps; limits of a run: {limits}; draws over a limit: {over}"

    def describe(self) -> Iterator[str]:
        """Yield the lines of a dry run."""
        if self.search is not None:
            yield from self.search.describe()
        elif self.settings.trials is not None:
            yield f"{self.runs} runs, drawn from {' '.join(p.word for p in self.space.parameters)}"
        else:
            yield from (" ".join(self.space.words(values)) for values in self.space.grid())

    def command(self, trial: Trial) -> list[str]:
        """Return the command that starts or resumes a trial."""
        default = [sys.executable, "-m", "finetune.cli", "train"]
        launch = shlex.split(self.settings.launch) if self.settings.launch else default
        folder = self.folder / trial.folder_name
        ours = [f"name={self.first.name}-{trial.number:03d}", f"output_dir={folder}", "train.resume=auto"]
        if self.search is not None and trial.until != self.search.total_steps:
            ours.append(f"train.pause_at={trial.until}")
        return [*launch, f"config={self.config}", *self.space.fixed, *self.space.words(trial.values), *ours]

    def heading(self, trial: Trial) -> str:
        """Return which run of the sweep a trial is, and its settings."""
        if self.search is None:
            return f"run {trial.number}/{self.runs}: {trial.described}"
        return f"trial {trial.number} to step {trial.until}/{self.search.total_steps}: {trial.described}"


def minimizes(settings: SweepSettings) -> bool:
    """Return whether a lower metric is better."""
    if settings.direction != "auto":
        return settings.direction == "minimize"
    return figure_named(settings.metric).lower_is_better is not False


def plan_sweep(config: str, words: Sequence[str], settings: SweepSettings, log: Log) -> Plan:
    """Read the settings that vary, and validate every combination.

    Args:
        words: overrides of the command line, without those of `sweep.`.

    Raises:
        ConfigError: with every problem.
    """
    auto = settings.space == "auto"
    searching = auto or settings.trials is not None
    if settings.trials is not None and find_spec("optuna") is None:
        raise MissingExtra(f"sweep.trials: {_NEEDS_OPTUNA}")
    problems = _settings_problems(settings)
    given = read_space(words, config, searching, may_be_fixed=auto)
    first = load_config(config, given.fixed) if auto else _checked(config, given, searching)
    problems += _metric_problems(settings, first)
    if problems:
        raise ConfigError("\n".join(problems))
    if not auto:
        return Plan(config, given, settings, first)
    search = plan_search(config, given, first, settings, minimize=minimizes(settings), log=log)
    _checked(config, search.space, searching)
    search.check()
    return Plan(config, search.space, settings, first, search)


def _settings_problems(settings: SweepSettings) -> list[str]:
    """Return what is wrong with the settings of the sweep beside its metric."""
    if settings.space is None:
        idle = [name for name in ("budget", "memory_gb", "hours") if getattr(settings, name) is not None]
        return [f"sweep.{name}: needs sweep.space=auto" for name in idle]
    problems = [] if settings.trials is None else ["sweep.trials: sweep.space=auto takes sweep.budget in its place"]
    return problems + ([] if find_spec("optuna") else [f"sweep.space=auto: {_NEEDS_OPTUNA}"])


def _checked(config: str, space: Space, searching: bool) -> RunConfig:
    """Validate the combinations, and return the config of the first. Raises: ConfigError with every problem."""
    first: RunConfig | None = None
    problems: dict[str, str] = {}
    for values in _tried(space) if searching else space.grid():
        words = space.words(values)
        try:
            cfg = load_config(config, [*space.fixed, *words])
            first = first or cfg
        except ConfigError as error:
            problems.setdefault(str(error), " ".join(words))
    if problems or first is None:
        listed = (f"with {values}: {message}" for message, values in problems.items())
        shown = first_lines(listed, len(problems), _SHOWN_PROBLEMS)
        raise ConfigError("\n".join(["some combinations of this sweep are invalid:", *shown]))
    return first


def _tried(space: Space) -> Iterator[dict[str, str]]:
    """Yield the combinations that a search checks: each value with the first ones of the other settings."""
    ends = {
        p.key: p.choices or tuple(repr(int(end) if p.whole else end) for end in (p.low, p.high))
        for p in space.parameters
    }
    firsts = {key: values[0] for key, values in ends.items()}
    yield firsts
    for key, values in ends.items():
        yield from ({**firsts, key: value} for value in values[1:])


def _metric_problems(settings: SweepSettings, cfg: RunConfig) -> list[str]:
    """Return what is wrong with a metric that no run computes."""
    metric = settings.metric
    held_out = bool(cfg.data.eval or cfg.data.held_out)
    teacher = ("teacher_kl", "teacher_agreement") if cfg.has_teacher else ()
    learns_preferences = cfg.preference.objective != "none"
    scores = ("reward_accuracy", "reward_margin") if learns_preferences else ("perplexity", "accuracy")
    of_set = ("loss", *scores, *teacher, *cfg.generation.metrics)
    name = metric.rpartition("/")[2]
    advice = f"; set generation.metrics=[{name}]" if name in ANSWER_METRICS else ""
    needs = {
        "eval/": (held_out, "needs a held-out set; set data.eval or data.held_out"),
        "eval/SET/": (name in of_set, f"is not computed by these runs, which have {', '.join(of_set)}{advice}"),
        "eval_loss": (held_out, "needs a held-out set; set data.eval or data.held_out, or sweep.metric=final_loss"),
        "exact_match_after": (cfg.generation.num_examples > 0, "needs answers; set generation.num_examples=100"),
        "teacher_kl_after": (cfg.distill.objective != "none", "needs a teacher; set distill.objective"),
        "recovered": (cfg.distill.objective == "recover", "needs distill.objective=recover"),
    }
    known = (metric in METRICS, f"unknown; choose from {', '.join(METRICS)}, eval/SET/accuracy")
    rules = ("eval/", "eval/SET/") if metric.startswith("eval/") else (metric,)
    if settings.space == "auto" and metric == "exact_match_after":
        needs[metric] = (False, f"is measured at the end only; {_ALSO_BEFORE_THE_END}")
    return [f"sweep.metric={metric}: {text}" for fits, text in (needs.get(rule, known) for rule in rules) if not fits]
