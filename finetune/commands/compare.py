"""`finetune report` and `finetune compare`: what runs left in their folders, as pages and as a table."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from finetune.system.arguments import Arguments
from finetune.system.errors import InputError

REPORT_HELP = """\
usage: finetune report RUN…

Draws report.html in a run's folder again, from what lies there: figures, curves, answers before and after, the gap
table of `finetune eval`, data, settings. Training does so at its end; a run that was killed, or measured since, is
drawn anew.

Example
  finetune report outputs/quickstart"""

COMPARE_USAGE = """\
usage: finetune compare RUN RUN… [out=compare.html]

Prints what the runs set differently and how they ended, the best of each figure with a star. out= writes a page with
their curves over one another. Runs may be of any length, and still going on.

Example
  finetune compare outputs/a outputs/b out=compare.html
"""


def compare_help() -> str:
    """The usage and every setting of `finetune compare`."""
    from finetune.config.command_options import CompareOptions
    from finetune.config.options import options_help

    return f"{COMPARE_USAGE}\n{options_help(CompareOptions)}"


def run_report(arguments: Arguments) -> int:
    """`finetune report`. Raises: InputError for folders that hold no run, all of them named."""
    from finetune.report.page import REPORT, write_report
    from finetune.report.run import read_runs

    folders = _folders(arguments, "finetune report", 1)
    if arguments.overrides:
        raise InputError(f"finetune report takes folders of runs and nothing else; found {arguments.overrides[0]}")
    read_runs(folders)
    for folder in folders:
        _write(write_report, folder)
        print(folder / REPORT)
    return 0


def run_compare(arguments: Arguments) -> int:
    """`finetune compare`. Raises: InputError for folders that hold no run, all of them named."""
    from finetune.config.command_options import CompareOptions
    from finetune.config.options import read_options
    from finetune.report.compare import as_text, compare, write_comparison
    from finetune.report.run import read_runs
    from finetune.system.console import log

    options = read_options(CompareOptions, arguments.overrides, "finetune compare")
    runs = read_runs(_folders(arguments, "finetune compare", 2))
    comparison = compare(runs)
    print(as_text(comparison))
    for note in comparison.notes:
        log(f"note: {note}")
    for run in runs:
        for problem in run.problems:
            log(f"warning: {run.folder}: {problem}")
    if options.out is not None:
        file = Path(options.out).expanduser()
        if file.is_dir():
            raise InputError(f"out={options.out}: is a folder; name a file in it, as {file / 'compare.html'}")
        _write(lambda target: write_comparison(target, "Runs compared", comparison), file)
        log(f"page: {file}")
    return 0


def _folders(arguments: Arguments, command: str, fewest: int) -> list[Path]:
    if arguments.config is not None:
        raise InputError(f"{command} takes folders of runs and no config")
    folders = list(dict.fromkeys(Path(os.path.normpath(Path(path).expanduser())) for path in arguments.paths))
    if len(folders) < fewest:
        what = "the folder of a run, as outputs/quickstart" if fewest == 1 else "two folders of runs or more"
        one = f"; finetune report {folders[0]} draws one" if folders else ""
        raise InputError(f"{command} takes {what}{one}")
    return folders


def _write(write: Callable[[Path], object], target: Path) -> None:
    try:
        write(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from error
