"""Make the runs of a sweep one after another, and record each of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.report.facts import figure_named
from finetune.report.run import RESULT, read_run
from finetune.report.settings import flat
from finetune.sweep.outcome import write_outcome, write_table
from finetune.sweep.plan import METRICS, Plan
from finetune.sweep.process import Stop, run_process, wait_until_free
from finetune.sweep.record import Record, Trial, check_same, load_record
from finetune.sweep.suggest import suggest
from finetune.system.console import Log
from finetune.system.errors import ConfigError, FinetuneError, Interrupted, os_errors_as
from finetune.system.locks import locked


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
            plan, record = _open(plan)
            record.save(folder)
            _run_all(plan, record, stop, log)
            write_outcome(plan, record)
    if all(trial.status == "failed" for trial in record.trials):
        errors = dict.fromkeys(trial.error or "" for trial in record.trials)
        raise FinetuneError("\n".join(["every run of the sweep failed:", *errors]))
    return record


def _open(plan: Plan) -> tuple[Plan, Record]:
    """Return the folder's record, or a new one; and the plan, with the memory that limits a search since its start."""
    found, spec = load_record(plan.folder), _spec(plan)
    record = Record(spec, plan.settings.metric, plan.minimize)
    if found is not None:
        # The metric may change until it is measured.
        measured = any(trial.metric is not None or trial.rungs for trial in found.trials)
        free = () if measured else ("sweep.metric", "sweep.minimize")
        old, new = ({key: value for key, value in one.items() if key not in free} for one in (found.spec, spec))
        check_same(plan.folder, old, new)
        record = replace(record, trials=found.trials, memory_bytes=found.memory_bytes, exhausted=found.exhausted)
    elif not (plan.settings.trials or plan.search):
        record.trials = [Trial(i, values) for i, values in enumerate(plan.space.grid(), 1)]
    if plan.search is None:
        return plan, record
    if all(trial.status == "failed" for trial in record.trials):
        record.trials = []  # begins anew, after what made them fail is mended
    if found is None:
        record.memory_bytes = plan.search.limits.memory_bytes
    return replace(plan, search=plan.search.with_memory(record.memory_bytes)), record


def _spec(plan: Plan) -> dict[str, Any]:
    """Return the settings that decide the runs; a search can resume with more runs, so their number is left out."""
    settings = plan.settings
    parameters = [parameter for parameter in plan.space.parameters if parameter.word]
    varying = tuple(f"{parameter.key}." for parameter in parameters)
    fixed = {
        key: value
        for key, value in flat(plan.first.model_dump(mode="json"))
        if not f"{key}.".startswith(varying) and key not in ("output_dir", "name")
    }
    swept = {parameter.key: parameter.word.partition("=")[2] for parameter in parameters}
    spec = {**fixed, **swept, "sweep": "auto" if plan.search else "search" if settings.trials else "grid"}
    if spec["sweep"] != "grid":
        spec |= {"sweep.seed": settings.seed, "sweep.metric": settings.metric, "sweep.minimize": plan.minimize}
    if plan.search is not None:
        spec |= {"sweep.memory_gb": settings.memory_gb, "sweep.hours": settings.hours}
    return spec


def _trials(plan: Plan, record: Record) -> Iterator[Trial]:
    """Yield the trial that is next, until the sweep is complete."""
    if plan.search is not None:
        while (trial := plan.search.next(record)) is not None:
            yield trial
        return
    for number in range(1, plan.runs + 1):
        if number > len(record.trials):
            values = suggest(plan.space, record.trials, plan.minimize, plan.settings.seed)
            record.trials.append(Trial(number, values))
        yield record.trials[number - 1]


def _run_all(plan: Plan, record: Record, stop: Stop, log: Log) -> None:
    for trial in _trials(plan, record):
        heading = plan.heading(trial)
        before = [] if plan.search else record.trials[: trial.number - 1]
        earlier = next((other for other in before if other.values == trial.values), None)
        if _settle(trial, plan, record):
            log(f"{heading}: {trial.status} before")
        elif earlier is not None:
            trial.same_as, trial.metric = earlier.number, earlier.metric
            trial.status, trial.error = earlier.status, earlier.error
            log(f"{heading}: the same as run {earlier.number}")
        else:
            log(f"\n{heading}")
            _run(trial, plan, record, stop)
            log(f"{heading}: {trial.status}{_measured(trial, record)}{f', {trial.error}' if trial.error else ''}")
        record.save(plan.folder)
        write_table(plan.folder, record)
        _check_measured(trial, plan, record)
        if stop.received or (plan.search and trial.status == "stopped"):
            write_outcome(plan, record)
            message = f"stopped in {heading.partition(':')[0]}\nhelp: repeat the command to resume"
            raise Interrupted(stop.received or signal.SIGTERM, message)


def _measured(trial: Trial, record: Record) -> str:
    metric = figure_named(record.metric)
    value = trial.metric if trial.until is None else trial.rungs.get(trial.until)
    return "" if value is None else f", {metric.label}={metric.form(value)}"


def _check_measured(trial: Trial, plan: Plan, record: Record) -> None:
    """Raise ConfigError if a run has ended without the metric, which shows that no other run will measure it."""
    if trial.metric is not None or trial.rungs or not (plan.folder / trial.folder_name / RESULT).is_file():
        return
    run = read_run(plan.folder / trial.folder_name)
    if run.status in ("finished", "paused") and run.value(record.metric) is None:
        there = [*METRICS, *(run.result.get("evaluations") or {})]
        known = ", ".join(dict.fromkeys(name for name in there if run.figure(name) is not None))
        raise ConfigError(f"sweep.metric={record.metric}: not measured by {run.folder}; choose from {known}")


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
    """Record the metric of a run that has ended or paused, also of one that did so after its sweep was killed."""
    folder = plan.folder / trial.folder_name
    if trial.same_as is not None:
        return trial.status == "finished"
    if not (folder / RESULT).is_file():
        return False
    run = read_run(folder)
    paused = run.status == "paused" and run.result.get("steps") == trial.until
    if not paused and run.status != "finished":
        return False
    metric = run.figure(record.metric)
    trial.error = None if metric is not None else f"{record.metric} is {run.value(record.metric)}"
    trial.status = "paused" if paused else "finished"
    if not paused:
        trial.metric = metric
    if trial.until is not None and metric is not None:
        trial.rungs[trial.until] = metric
    elif trial.until is not None:  # A search cannot compare it.
        trial.status = "failed"
    return True
