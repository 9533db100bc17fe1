"""report.html: a run on one page, for a browser without network or script, light and dark, on a phone as well."""

from __future__ import annotations

from pathlib import Path

from finetune.report.curves import run_pictures
from finetune.report.dataset.page import row_functions
from finetune.report.dataset.stored import DATA, StoredReport, read_stored
from finetune.report.environment import page_environment
from finetune.report.facts import breaches, cards, environment, headline, next_commands, predictions
from finetune.report.gap import read_gap
from finetune.report.run import Run, read_run
from finetune.report.settings import changes
from finetune.system.atomic import write_text
from finetune.system.console import Log
from finetune.system.errors import IntegrityError

REPORT = "report.html"
_STATUS_WORDS = {
    "finished": "finished",
    "stopped": "stopped by a signal; its checkpoint is saved",
    "failed": "failed",
    "unfinished": "unfinished: it goes on, or was killed",
}


def write_report(folder: Path) -> Path:
    """Draw the report of a run from what lies in its folder. Returns: the file, written whole or not at all.

    Raises: InputError if the folder is none of a run; OSError if the page cannot be written.
    """
    page = render(read_run(folder))
    write_text(folder / REPORT, page)
    return folder / REPORT


def try_report(folder: Path, log: Log) -> None:
    """The report at the end of a run, which must not fail because of it."""
    try:
        log(f"report: {write_report(folder)}")
    except Exception as error:  # noqa: BLE001 - whatever it is, what was trained is saved and the run's end stays its end
        log(f"warning: {folder / REPORT} could not be written ({error}); finetune report {folder} tries again")


def render(run: Run) -> str:
    """The whole page; it names no other file and no address."""
    problems = list(run.problems)
    gap = None
    try:
        gap = read_gap(run.folder)
    except (IntegrityError, OSError) as error:
        problems.append(str(error))
    template = page_environment(**row_functions()).get_template("run.html")
    return template.render(
        run=run,
        status=_STATUS_WORDS.get(run.status, run.status),
        headline=headline(run),
        error=run.value("error"),
        cards=cards(run),
        pictures=run_pictures(run),
        stored=_stored(run, problems),
        gap=gap,
        streamed=bool(run.setting("data.stream_rows")),
        changes=changes(run.config),
        environment=environment(run),
        predictions=predictions(run),
        breaches=breaches(run),
        limit=run.setting("guard.max"),
        commands=next_commands(run),
        problems=problems,
    )


def _stored(run: Run, problems: list[str]) -> StoredReport | None:
    if not (run.folder / DATA).exists():
        return None
    try:
        return read_stored(run.folder / DATA)
    except (OSError, ValueError) as error:
        problems.append(f"{DATA} cannot be read: {str(error).splitlines()[0]}")
        return None
