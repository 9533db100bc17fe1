"""usage: finetune report RUN…

Draws report.html in the folder of a run again: metrics, curves, answers before and after, the gap table of
`finetune eval`, data and settings. Training draws it at its end; draw it again after a killed run or a new evaluation.

Example
  finetune report outputs/quickstart
"""

from __future__ import annotations

import os
from pathlib import Path

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.errors import InputError, os_errors_as


def run(arguments: Arguments) -> int:
    """Draw each report and print its path."""
    from finetune.report.run import read_runs
    from finetune.report.run_page import write_report

    folders = run_folders(arguments)
    if not folders:
        raise InputError("finetune report: the folder of a run is missing\nhelp: finetune report outputs/quickstart")
    read_runs(folders)
    for folder in folders:
        with os_errors_as(InputError, f"{folder}: cannot be written"):
            print(write_report(folder))
    return 0


def run_folders(arguments: Arguments) -> list[Path]:
    """Return the folders on the command line, each once."""
    return list(dict.fromkeys(Path(os.path.normpath(Path(path).expanduser())) for path in arguments.paths))


COMMAND = Command("report", __doc__, run, takes_paths=True)
