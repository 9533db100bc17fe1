"""Write report.html, the page of one run."""

from __future__ import annotations

from pathlib import Path

from finetune.evaluation.gap_table import load_gap
from finetune.evaluation.gap_text import gap_blocks, gap_figure
from finetune.report import facts
from finetune.report.curves import run_pictures
from finetune.report.dataset.files import DATA, read_stored
from finetune.report.environment import render_page
from finetune.report.run import Run, read_run
from finetune.report.settings import changes
from finetune.system.atomic import write_text
from finetune.system.console import Log
from finetune.system.errors import IntegrityError
from finetune.system.plotting import svg

REPORT = "report.html"
_STATUS = {
    "paused": "paused at the step of train.pause_at; a checkpoint is saved",
    "stopped": "stopped by a signal; a checkpoint is saved",
    "unfinished": "unfinished: still running, or killed",
}


def write_report(folder: Path) -> Path:
    """Write the report of a run from the files in its folder, and return the report's path.

    Raises:
        InputError: the folder holds no run.
        OSError: the report cannot be written.
    """
    page = render(read_run(folder))
    write_text(folder / REPORT, page)
    return folder / REPORT


def try_report(folder: Path, log: Log) -> None:
    """Write the report at the end of a run; log a warning if that fails."""
    try:
        log(f"report: {write_report(folder)}")
    except Exception as error:  # noqa: BLE001 - the trained adapter is saved: no error here may change the run's end
        log(f"warning: {folder / REPORT}: cannot be written ({error})\nhelp: finetune report {folder}")


def render(run: Run) -> str:
    """Render the whole page; it refers to no other file and no address."""
    problems = list(run.problems)
    gap = stored = None
    try:
        gap = load_gap(run.folder)
    except (IntegrityError, OSError) as error:
        problems.append(str(error))
    if (run.folder / DATA).exists():
        try:
            stored = read_stored(run.folder / DATA)
        except (OSError, ValueError) as error:
            problems.append(f"{DATA}: cannot be read ({str(error).splitlines()[0]})")
    worst_text, worst = facts.worst_answers(run)
    return render_page(
        "run.html",
        title=f"{run.name}: run report",
        run=run,
        status=_STATUS.get(run.status, run.status),
        headline=facts.headline(run),
        origin=facts.origin(run),
        error=run.value("error"),
        cards=facts.cards(run),
        pictures=run_pictures(run, steps_per_epoch=stored.report.order.steps if stored else None),
        worst_text=worst_text,
        samples=facts.with_previews(run.samples),
        worst=facts.with_previews(worst),
        rewarded=[(heading, facts.with_previews(answers)) for heading, answers in facts.rewarded_answers(run)],
        stored=stored,
        gap_blocks=[] if gap is None else gap_blocks(gap),
        gap_svg=svg(gap_figure(gap)) if gap is not None and any(model.sets for model in gap.models) else "",
        streamed=bool(run.setting("data.stream_rows")),
        changes=changes(run.config),
        environment=facts.environment(run),
        predictions=facts.predictions(run),
        breaches=facts.breaches(run),
        halvings=facts.halvings(run),
        limit=run.setting("guard.max"),
        commands=facts.next_commands(run),
        problems=problems,
    )
