"""Check every combination of a sweep, then run them one after another."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.config.command_options import SweepSettings
from finetune.config.compose import load_config
from finetune.config.schema import RunConfig
from finetune.evaluation.metric_names import ANSWER_METRICS
from finetune.report.facts import FIGURES, figure_named
from finetune.report.run import RESULT, read_run
from finetune.report.settings import flat
from finetune.sweep.process import Stop, run_process, wait_until_free
from finetune.sweep.record import Record, Trial, check_same, load_record, write_outcome, write_table
from finetune.sweep.space import Space, read_space, suggest
from finetune.system.console import Log
from finetune.system.errors import ConfigError, FinetuneError, Interrupted, MissingExtra, os_errors_as
from finetune.system.format import first_lines
from finetune.system.locks import locked

_SHOWN_PROBLEMS = 10
_METRICS = sorted(figure.name for figure in FIGURES if figure.lower_is_better is not None)


@dataclass(frozen=True)
class Plan:
    """A sweep whose combinations are all valid; `first` is the config of one of them."""

    config: str
    space: Space
    settings: SweepSettings
    first: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.settings.out or f"outputs/{self.first.name}-sweep").expanduser()

    @property
    def minimize(self) -> bool:
        if self.settings.direction != "auto":
            return self.settings.direction == "minimize"
        return figure_named(self.settings.metric).lower_is_better is not False

    @property
    def runs(self) -> int:
        return self.settings.trials or self.space.combinations

    def command(self, trial: Trial) -> list[str]:
        """Return the command that starts or resumes a trial."""
        default = [sys.executable, "-m", "finetune.cli", "train"]
        launch = shlex.split(self.settings.launch) if self.settings.launch else default
        folder = self.folder / trial.folder_name
        ours = [f"name={self.first.name}-{trial.number:03d}", f"output_dir={folder}", "train.resume=auto"]
        return [*launch, f"config={self.config}", *self.space.fixed, *_words(trial.values), *ours]


def _words(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def plan_sweep(config: str, words: Sequence[str], settings: SweepSettings) -> Plan:
    """Read the settings that vary, and validate every combination.

    Args:
        words: overrides of the command line, without those of `sweep.`.

    Raises:
        ConfigError: with every problem.
    """
    searching = settings.trials is not None
    if searching and find_spec("optuna") is None:
        raise MissingExtra('sweep.trials: needs Optuna\nhelp: pip install "finetune-qlora[sweep]"')
    space = read_space(words, config, searching)
    first: RunConfig | None = None
    problems: dict[str, str] = {}
    for values in _tried(space) if searching else space.grid():
        try:
            cfg = load_config(config, [*space.fixed, *_words(values)])
            first = first or cfg
        except ConfigError as error:
            problems.setdefault(str(error), " ".join(_words(values)))
    if problems or first is None:
        listed = (f"with {values}: {message}" for message, values in problems.items())
        shown = first_lines(listed, len(problems), _SHOWN_PROBLEMS)
        raise ConfigError("\n".join(["some combinations of this sweep are invalid:", *shown]))
    _check_metric(settings.metric, first)
    return Plan(config, space, settings, first)


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


def _check_metric(metric: str, cfg: RunConfig) -> None:
    """Raise ConfigError for a metric that no run computes."""
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
    known = (metric in _METRICS, f"unknown; choose from {', '.join(_METRICS)}, eval/SET/accuracy")
    rules = ("eval/", "eval/SET/") if metric.startswith("eval/") else (metric,)
    for fits, text in (needs.get(rule, known) for rule in rules):
        if not fits:
            raise ConfigError(f"sweep.metric={metric}: {text}")


def run_sweep(plan: Plan, log: Log) -> Record:
    """Make the missing runs, and write the table after each of them.

    Raises:
        ConfigError: the folder holds another sweep, or a sweep is running in it.
        Interrupted: after a signal, once the current run has saved its checkpoint.
        FinetuneError: every run failed.
    """
    folder = plan.folder
    with os_errors_as(ConfigError, f"sweep.out={folder}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", 0) as free, Stop() as stop:
            if not free:
                raise ConfigError(f"sweep.out={folder}: a sweep is running there")
            record = _open(plan)
            record.save(folder)
            _run_all(plan, record, stop, log)
            write_outcome(folder, plan.first.name, record)
    if all(trial.status == "failed" for trial in record.trials):
        errors = dict.fromkeys(trial.error or "" for trial in record.trials)
        raise FinetuneError("\n".join(["every run of the sweep failed:", *errors]))
    return record


def _open(plan: Plan) -> Record:
    """Return the folder's record, or a new one."""
    found, spec = load_record(plan.folder), _spec(plan)
    if found is not None:
        # The metric may change until it is measured.
        measured = any(trial.metric is not None for trial in found.trials)
        free = () if measured else ("sweep.metric", "sweep.minimize")
        old, new = ({key: value for key, value in one.items() if key not in free} for one in (found.spec, spec))
        check_same(plan.folder, old, new)
        trials = found.trials
    else:
        trials = [] if plan.settings.trials else [Trial(i, values) for i, values in enumerate(plan.space.grid(), 1)]
    return Record(spec, plan.settings.metric, plan.minimize, trials)


def _spec(plan: Plan) -> dict[str, Any]:
    """Return the settings that decide the runs; a search can resume with more trials, so their number is left out."""
    varying = tuple(f"{parameter.key}." for parameter in plan.space.parameters)
    fixed = {
        key: value
        for key, value in flat(plan.first.model_dump(mode="json"))
        if not f"{key}.".startswith(varying) and key not in ("output_dir", "name")
    }
    swept = {parameter.key: parameter.word.partition("=")[2] for parameter in plan.space.parameters}
    spec = {**fixed, **swept, "sweep": "grid"}
    if plan.settings.trials:
        spec |= {"sweep": "search", "sweep.seed": plan.settings.seed}
        spec |= {"sweep.metric": plan.settings.metric, "sweep.minimize": plan.minimize}
    return spec


def _run_all(plan: Plan, record: Record, stop: Stop, log: Log) -> None:
    for number in range(1, plan.runs + 1):
        if number > len(record.trials):
            values = suggest(plan.space, record.trials, plan.minimize, plan.settings.seed)
            record.trials.append(Trial(number, values))
        trial = record.trials[number - 1]
        heading = f"run {number}/{plan.runs}: {trial.described}"
        earlier = next((other for other in record.trials[: number - 1] if other.values == trial.values), None)
        if _settle(trial, plan, record):
            log(f"{heading}: finished before")
        elif earlier is not None:
            trial.same_as, trial.metric = earlier.number, earlier.metric
            trial.status, trial.error = earlier.status, earlier.error
            log(f"{heading}: the same as run {earlier.number}")
        else:
            log(f"\n{heading}")
            _run(trial, plan, record, stop)
            metric = figure_named(record.metric)
            measured = "" if trial.metric is None else f", {metric.label}={metric.form(trial.metric)}"
            log(f"{heading}: {trial.status}{measured}{f', {trial.error}' if trial.error else ''}")
        record.save(plan.folder)
        write_table(plan.folder, record)
        if trial.status == "finished" and trial.metric is None:
            # A run that has finished without the metric shows that no other run will measure it.
            run = read_run(plan.folder / trial.folder_name)
            if run.value(record.metric) is None:
                there = [*_METRICS, *(run.result.get("evaluations") or {})]
                known = ", ".join(dict.fromkeys(name for name in there if run.figure(name) is not None))
                raise ConfigError(f"sweep.metric={record.metric}: not measured by {run.folder}; choose from {known}")
        if stop.received:
            write_outcome(plan.folder, plan.first.name, record)
            raise Interrupted(stop.received, f"stopped in run {number}/{plan.runs}\nhelp: repeat the command to resume")


def _run(trial: Trial, plan: Plan, record: Record, stop: Stop) -> None:
    folder = plan.folder / trial.folder_name
    wait_until_free(folder, stop)
    before = _changed(folder / RESULT)
    trial.status, trial.error = "running", None
    record.save(plan.folder)
    code, message = run_process(plan.command(trial), plan.folder / f"{trial.folder_name}.log", stop)
    if code == 0 and _settle(trial, plan, record):
        return
    if _changed(folder / RESULT) != before:
        message = str(read_run(folder).result.get("error") or "") or message
    stopped = code in (130, 143) or bool(stop.received)
    trial.status = "stopped" if stopped else "failed"
    trial.error = None if stopped else (message or f"exit code {code}, no output")


def _changed(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def _settle(trial: Trial, plan: Plan, record: Record) -> bool:
    """Record the metric of a finished run, also of one that finished after its sweep was killed."""
    folder = plan.folder / trial.folder_name
    if trial.same_as is not None:
        return trial.status == "finished"
    if not (folder / RESULT).is_file() or (run := read_run(folder)).status != "finished":
        return False
    trial.status, trial.metric = "finished", run.figure(record.metric)
    trial.error = None if trial.metric is not None else f"{record.metric} is {run.value(record.metric)}"
    return True
