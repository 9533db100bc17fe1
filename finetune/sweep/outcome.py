"""The table, picture and page of a sweep's runs, and the configs of the best ones of a search."""

from __future__ import annotations

from pathlib import Path

from finetune.config.compose import to_yaml
from finetune.report.compare import text_table
from finetune.report.facts import FIGURES, figure_named
from finetune.report.run import Run, read_run
from finetune.report.sweep import Point, effects_figure, front_figure, write_sweep_page
from finetune.sweep.halving import pareto_front
from finetune.sweep.plan import Plan
from finetune.sweep.record import Record, Trial
from finetune.system.atomic import write_text
from finetune.system.errors import InputError
from finetune.system.format import format_bytes
from finetune.system.plotting import save_png

TABLE, PICTURE, PAGE, BEST = "sweep.md", "sweep.png", "sweep.html", "best.yaml"
_MORE_FIGURES = ("eval_loss", "exact_match_after", "final_loss", "train_seconds", "peak_bytes")


def table(folder: Path, record: Record) -> list[list[str]]:
    """Return the head, then one row per run: its settings, the metric, other figures and its status.

    A search has the metric of the last step of each trial, its stored bytes, and the files of the best configs.
    """
    keys = list(dict.fromkeys(key for trial in record.trials for key in trial.values))
    metric, configs = figure_named(record.metric), config_names(record)
    runs = {trial.number: _run_of(folder, trial) for trial in record.trials}
    more = [
        figure
        for figure in FIGURES
        if figure.name in _MORE_FIGURES
        and figure.name != record.metric
        and any(run is not None and run.figure(figure.name) is not None for run in runs.values())
    ]
    searched = any(trial.plan is not None for trial in record.trials)
    head = ["config", "stored", "steps"] if searched else []
    rows = [["run", *keys, metric.label, *head, *(figure.label for figure in more), "status"]]
    for trial in record.ranked():
        run = runs[trial.number]
        values = [None if run is None else run.figure(figure.name) for figure in more]
        status = trial.status if trial.same_as is None else f"as {trial.folder_name}"
        if trial.error and trial.same_as is None:
            status += f": {trial.error.splitlines()[0]}"
        step, at_rung = max(trial.rungs.items(), default=(0, None))
        measured = trial.metric if trial.metric is not None else at_rung
        size = "" if trial.plan is None else format_bytes(trial.plan.stored_bytes)
        rows.append(
            [
                f"trial-{trial.number:03d}",
                *(trial.values.get(key, "") for key in keys),
                "" if measured is None else metric.form(measured),
                *((configs.get(trial.number, ""), size, str(step)) if searched else ()),
                *("" if value is None else figure.form(value) for figure, value in zip(more, values, strict=True)),
                status,
            ]
        )
    return rows


def config_names(record: Record) -> dict[int, str]:
    """Return the file of the config of each trial on the Pareto front, by its number; the best metric comes first."""
    front = pareto_front(record.trials, record.minimize)
    return {trial.number: f"pareto-{i}.yaml" if i > 1 else BEST for i, trial in enumerate(front, 1)}


def _run_of(folder: Path, trial: Trial) -> Run | None:
    try:
        return read_run(folder / trial.folder_name)
    except InputError:
        return None  # not started


def write_table(folder: Path, record: Record) -> None:
    """Write sweep.md."""
    write_text(folder / TABLE, text_table(table(folder, record)) + "\n")


def write_outcome(plan: Plan, record: Record) -> None:
    """Write sweep.md, sweep.png and sweep.html; of a search also best.yaml and the other configs of the front."""
    folder, name = plan.folder, plan.first.name
    write_table(folder, record)
    ranked, results = record.ranked(), record.results()
    points = _points(record)
    if results is not None:
        save_png(front_figure(points, results.metric) if points else effects_figure(results), folder / PICTURE)
    if plan.search is not None:
        _write_configs(plan, record)
    write_sweep_page(
        folder / PAGE,
        f"{name}: sweep",
        plan.headline(record),
        best=_cards(ranked[0], record),
        results=results,
        points=points,
        rows=table(folder, record),
        runs=[
            (f"trial-{trial.number:03d}: {trial.described}", run)
            for trial in ranked
            if trial.same_as is None and (run := _run_of(folder, trial)) is not None and run.metrics
        ],
    )


def _cards(best: Trial, record: Record) -> list[tuple[str, str, str]]:
    if best.metric is None:
        return []
    metric = figure_named(record.metric)
    cards = [(f"best {metric.label}", metric.form(best.metric), best.folder_name)]
    if best.plan is not None:
        cards.append(("stored model", format_bytes(best.plan.stored_bytes), "base in its bits, and adapter"))
    return [*cards, *((key, value, "") for key, value in best.values.items())]


def _points(record: Record) -> list[Point]:
    """Return the trials of a search for its picture, each at its last step."""
    front, points = config_names(record), []
    for trial in record.trials:
        if trial.plan is not None and trial.rungs:
            place = "front" if trial.number in front else "full" if trial.metric is not None else "paused"
            metric = trial.rungs[max(trial.rungs)]
            points.append(Point(str(trial.number), trial.plan.stored_bytes, metric, place))
    return points


def _write_configs(plan: Plan, record: Record) -> None:
    """Write the config of each trial on the Pareto front, which trains as it is."""
    assert plan.search is not None
    for old in plan.folder.glob("pareto-*.yaml"):
        old.unlink()
    trials = {trial.number: trial for trial in record.trials}
    for number, name in config_names(record).items():
        trial = trials[number]
        cfg = plan.search.config_of(trial.values)
        cfg = cfg.model_copy(update={"name": f"{cfg.name}-{Path(name).stem}"})
        lines = [line for line in to_yaml(cfg, changed_only=True).splitlines() if not line.startswith("output_dir:")]
        head = [
            f"# finetune train config={plan.folder / name}",
            f"# {trial.folder_name} of a search: {figure_named(record.metric).label}={trial.metric:.6g}, {trial.plan}",
        ]
        write_text(plan.folder / name, "\n".join([*head, *lines]) + "\n")
