"""usage: finetune compare RUN RUN… [out=compare.html]

Prints the settings that differ and the final metrics; a star marks the best of each metric. out= also writes a page
with the curves of all runs. Runs may have any length and may still be training.

Example
  finetune compare outputs/a outputs/b out=compare.html
"""

from __future__ import annotations

from pathlib import Path

from finetune.commands.base import Command
from finetune.commands.report import run_folders
from finetune.system.arguments import Arguments
from finetune.system.console import log
from finetune.system.errors import InputError, os_errors_as


def run(arguments: Arguments) -> int:
    """Print the comparison, and write the page that out= names."""
    from finetune.report.compare import as_text, compare, write_comparison
    from finetune.report.run import read_runs

    out, folders = arguments.options.out, run_folders(arguments)
    if len(folders) < 2:
        advice = f"finetune report {folders[0]} shows one run" if folders else "finetune compare outputs/a outputs/b"
        raise InputError(f"finetune compare: needs two or more folders of runs, found {len(folders)}\nhelp: {advice}")
    runs = read_runs(folders)
    comparison = compare(runs)
    print(as_text(comparison))
    for note in comparison.notes:
        log(f"note: {note}")
    for one in runs:
        for problem in one.problems:
            log(f"warning: {one.folder}: {problem}")
    if out is not None:
        file = Path(out).expanduser()
        if file.is_dir():
            raise InputError(f"out={out}: is a folder\nhelp: name a file in it, as {file / 'compare.html'}")
        with os_errors_as(InputError, f"{file}: cannot be written"):
            write_comparison(file, "Runs compared", comparison)
        log(f"page: {file}")
    return 0


COMMAND = Command("compare", __doc__, run, options="CompareOptions", takes_paths=True)
