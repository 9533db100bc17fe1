"""usage: finetune eval adapter=RUN_OR_ADAPTER [data=[{path: rows.jsonl}]] [key=value …] [--json]
       finetune eval model=FOLDER data=[{path: rows.jsonl}] [key=value …] [--json]

Measures the 16-bit base, the quantized base, the trained model and the merged model on the same held-out rows, one in
memory at a time: loss, token accuracy, correct answers, and distance from the 16-bit base, with 95 % confidence
intervals. Prints the table; writes gap.json, gap.md and gap.png into the run of the adapter, or into out=DIR. The
report of the run then shows the table.
  --json   print the table as JSON

Examples
  finetune eval adapter=outputs/quickstart
  finetune eval adapter=outputs/lora 'forgetting=[{path: general.jsonl}]' metric=number limit=500
  finetune eval model=merged 'data=[{path: heldout.jsonl}]' quant=nf4
  finetune eval adapter=outputs/lora 'variants=[trained]' 'tasks=[gsm8k_local.yaml]' answers=0
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.console import log, printable
from finetune.system.errors import ConfigError

if TYPE_CHECKING:
    from finetune.config.command_options import EvalOptions


def run(arguments: Arguments) -> int:
    """Measure, write the files, and print the table."""
    from finetune.evaluation.options import check_options

    options = arguments.options
    check_options(options)  # Takes a tenth of the time of importing torch.
    folder = _result_folder(options)

    from finetune.evaluation.compare import evaluate_gap
    from finetune.evaluation.gap_table import to_json
    from finetune.evaluation.gap_text import gap_markdown

    table = evaluate_gap(options, log, write_merged, None if folder is None else _nearest_existing(folder))
    if folder is None:
        log("results: not written, the adapter has no run folder; out=DIR writes gap.json, gap.md and gap.png")
    else:
        from finetune.evaluation.gap_text import write_gap
        from finetune.report.run_page import REPORT, try_report

        log(f"written: {', '.join(map(str, write_gap(table, folder)))}")
        if (folder / REPORT).is_file():
            try_report(folder, log)
    print(to_json(table) if "--json" in arguments.flags else printable(gap_markdown(table)), end="")
    return 0


def write_merged(adapter: str, out: Path) -> None:
    """Merge an adapter into its base without a measurement; `evaluate_gap` calls this."""
    from finetune.config.command_options import KlCheckOptions, MergeOptions
    from finetune.export.merge.merge import merge

    merge(MergeOptions(adapter=adapter, out=str(out), kl_check=KlCheckOptions(num_examples=0)), log=lambda text: None)


def _result_folder(options: EvalOptions) -> Path | None:
    """Return `out`, or the run of the adapter, or None; raise ConfigError if the folder cannot be written to."""
    from finetune.evaluation.gap_table import load_gap

    if options.out is not None:
        folder, word = Path(options.out).expanduser(), f"out={options.out}"
    else:
        folder, word = Path(options.adapter or "").expanduser(), f"adapter={options.adapter}"
        if options.adapter is None or not (folder / "config.yaml").is_file():
            return None
    existing = _nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{word}: {existing} cannot be written to\nhelp: name another folder with out=DIR")
    load_gap(folder)  # Refuses a gap.json of another program.
    return folder


def _nearest_existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


COMMAND = Command("eval", __doc__, run, options="EvalOptions", flags=("--json",))
