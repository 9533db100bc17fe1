"""The table, picture and page of a sweep's runs."""

from __future__ import annotations

from pathlib import Path

from finetune.report.compare import text_table
from finetune.report.facts import FIGURES, figure_named
from finetune.report.run import Run, read_run
from finetune.report.sweep import effects_figure, write_sweep_page
from finetune.sweep.record import Record, Trial
from finetune.system.atomic import write_text
from finetune.system.errors import InputError
from finetune.system.plotting import save_png

TABLE, PICTURE, PAGE = "sweep.md", "sweep.png", "sweep.html"
_MORE_FIGURES = ("eval_loss", "exact_match_after", "final_loss", "train_seconds", "peak_bytes")


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
