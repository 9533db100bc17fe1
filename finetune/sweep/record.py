"""The files of a sweep's folder: sweep.json, from which it resumes, and the table, picture and page of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from finetune.report.compare import text_table
from finetune.report.facts import FIGURES, figure_named
from finetune.report.run import Run, read_run
from finetune.report.settings import shown
from finetune.report.sweep import SweepResults, effects_figure, write_sweep_page
from finetune.system.atomic import write_text
from finetune.system.errors import ConfigError, FinetuneError, InputError, IntegrityError, os_errors_as
from finetune.system.plotting import save_png
from finetune.system.sealed import seal, unseal

RECORD, TABLE, PICTURE, PAGE = "sweep.json", "sweep.md", "sweep.png", "sweep.html"
_FULL = "free space and repeat the command; finished runs are kept"
_MORE_FIGURES = ("eval_loss", "exact_match_after", "final_loss", "train_seconds", "peak_bytes")


@dataclass
class Trial:
    """A run of a sweep.

    Attributes:
        number: counts from 1.
        values: override texts by key.
        metric: None until it is measured.
        error: why the run failed.
        same_as: number of an earlier run with the same values; this one is not repeated.
    """

    number: int
    values: dict[str, str]
    status: Literal["waiting", "running", "finished", "stopped", "failed"] = "waiting"
    metric: float | None = None
    error: str | None = None
    same_as: int | None = None

    @property
    def folder_name(self) -> str:
        return f"trial-{self.same_as or self.number:03d}"

    @property
    def described(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())


@dataclass
class Record:
    """A sweep; it resumes only with an equal `spec`."""

    spec: dict[str, Any]
    metric: str
    minimize: bool
    trials: list[Trial] = field(default_factory=list)

    def ranked(self) -> list[Trial]:
        """Return the runs, best first; those without a metric are last, in their order."""
        sign = 1 if self.minimize else -1
        return sorted(self.trials, key=lambda t: (t.metric is None, sign * (t.metric or 0.0), t.number))

    def results(self) -> SweepResults | None:
        """Return the settings and metrics of the measured runs, or None if there are none."""
        runs = [(t.values, t.metric) for t in self.trials if t.metric is not None and t.same_as is None]
        return SweepResults(figure_named(self.metric).label, self.minimize, runs) if runs else None

    def save(self, folder: Path) -> None:
        """Write sweep.json."""
        best = next((trial.number for trial in self.ranked() if trial.metric is not None), None)
        content = seal({**asdict(self), "best": best})
        with os_errors_as(FinetuneError, f"sweep.out={folder}: cannot be written", _FULL):
            write_text(folder / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load_record(folder: Path) -> Record | None:
    """Read the sweep of a folder; None for an empty or a new folder.

    Raises:
        ConfigError: the folder holds runs, but no sweep.
        IntegrityError: sweep.json is corrupt.
    """
    file = folder / RECORD
    if not file.exists():
        if any(folder.glob("trial-*")):
            raise ConfigError(f"sweep.out={folder}: holds runs but no {RECORD}\nhelp: choose another folder")
        return None
    try:
        return TypeAdapter(Record).validate_python(unseal(json.loads(file.read_bytes())))
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{file}: corrupt ({error})\nhelp: the runs in the folder are valid; choose another sweep.out"
        ) from error


def check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ConfigError with every difference between a sweep and the one in the folder."""
    plain, lines = json.loads(json.dumps(new)), []
    for key in sorted(old.keys() | plain.keys()):
        there, here = old.get(key), plain.get(key)
        if there != here:
            texts = ("nothing" if value is None else shown(value) for value in (there, here))
            lines.append(f"  {key}: {' there, found '.join(texts)}")
    if lines:
        help_line = "help: repeat its command, or choose another sweep.out"
        raise ConfigError("\n".join([f"sweep.out={folder}: holds another sweep", *lines, help_line]))


def table(folder: Path, record: Record) -> list[list[str]]:
    """Return the head, then one row per run: its settings, the metric, other figures and its status."""
    keys = list(dict.fromkeys(key for trial in record.trials for key in trial.values))
    metric = figure_named(record.metric)
    runs = {trial.number: _run_of(folder, trial) for trial in record.trials}
    more = [
        figure
        for figure in FIGURES
        if figure.name in _MORE_FIGURES
        and figure.name != record.metric
        and any(run is not None and run.figure(figure.name) is not None for run in runs.values())
    ]
    rows = [["run", *keys, metric.label, *(figure.label for figure in more), "status"]]
    for trial in record.ranked():
        run = runs[trial.number]
        values = [None if run is None else run.figure(figure.name) for figure in more]
        status = trial.status if trial.same_as is None else f"as {trial.folder_name}"
        if trial.error and trial.same_as is None:
            status += f": {trial.error.splitlines()[0]}"
        rows.append(
            [
                f"trial-{trial.number:03d}",
                *(trial.values.get(key, "") for key in keys),
                "" if trial.metric is None else metric.form(trial.metric),
                *("" if value is None else figure.form(value) for figure, value in zip(more, values, strict=True)),
                status,
            ]
        )
    return rows


def _run_of(folder: Path, trial: Trial) -> Run | None:
    try:
        return read_run(folder / trial.folder_name)
    except InputError:
        return None  # not started


def write_table(folder: Path, record: Record) -> None:
    """Write sweep.md."""
    write_text(folder / TABLE, text_table(table(folder, record)) + "\n")


def write_outcome(folder: Path, name: str, record: Record) -> None:
    """Write sweep.md, sweep.png and sweep.html."""
    write_table(folder, record)
    ranked, results = record.ranked(), record.results()
    finished = sum(trial.status == "finished" for trial in record.trials)
    cards = []
    if results is not None:
        save_png(effects_figure(results), folder / PICTURE)
        best, metric = ranked[0], figure_named(record.metric)
        cards = [(f"best {metric.label}", metric.form(best.metric or 0.0), best.folder_name)]
        cards += [(key, value, "") for key, value in best.values.items()]
    write_sweep_page(
        folder / PAGE,
        f"{name}: sweep",
        f"{len(record.trials)} runs, {finished} finished",
        best=cards,
        results=results,
        rows=table(folder, record),
        runs=[
            (f"trial-{trial.number:03d}: {trial.described}", run)
            for trial in ranked
            if trial.same_as is None and (run := _run_of(folder, trial)) is not None and run.metrics
        ],
    )
