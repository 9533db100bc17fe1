"""`finetune eval`: an adapter or a model on held-out rows, beside what it is made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.system.arguments import Arguments
from finetune.system.errors import ConfigError, InputError

if TYPE_CHECKING:
    from finetune.config.command_options import EvalOptions

USAGE = """\
usage: finetune eval adapter=RUN_OR_ADAPTER [data=[{path: rows.jsonl}]] [key=value …] [--json]
       finetune eval model=FOLDER data=[{path: rows.jsonl}] [key=value …] [--json]

Measures the base in 16 bit, the quantized base, that with the adapter, and the merged model on the same held-out rows,
one in memory at a time: loss, token accuracy, right answers, and how far each is from the 16-bit base, all with 95 %
intervals. The table goes to stdout; gap.json, gap.md and gap.png into the adapter's run, whose report then shows them
too, or into out=DIR.
  --json   print the table as JSON

Examples
  finetune eval adapter=outputs/quickstart
  finetune eval adapter=outputs/lora 'forgetting=[{path: general.jsonl}]' metric=number limit=500
  finetune eval model=merged 'data=[{path: heldout.jsonl}]' quant=nf4
  finetune eval adapter=outputs/lora 'variants=[trained]' 'tasks=[gsm8k_local.yaml]' answers=0
"""


def eval_help() -> str:
    """The usage and every setting."""
    from finetune.config.command_options import EvalOptions
    from finetune.config.options import options_help

    return f"{USAGE}\n{options_help(EvalOptions)}"


def run_eval(arguments: Arguments) -> int:
    """`finetune eval`. Raises: InputError for what cannot be meant; what reading, loading and merging raise."""
    from finetune.config.command_options import EvalOptions
    from finetune.config.options import read_options

    if arguments.config is not None:
        raise InputError("finetune eval takes no config; the adapter's run has its own: adapter=outputs/NAME")
    options = read_options(EvalOptions, arguments.overrides, "finetune eval")
    place = _place(options)

    from finetune.evaluation.compare import evaluate_gap
    from finetune.evaluation.gap_table import to_json
    from finetune.evaluation.gap_text import gap_markdown
    from finetune.system.console import log, printable

    table = evaluate_gap(options, log, write_merged, None if place is None else _existing(place))
    if place is None:
        log("nothing is written: this is no run's folder; out=DIR writes gap.json, gap.md and gap.png")
    else:
        from finetune.evaluation.result_files import write_gap
        from finetune.report.page import REPORT, try_report

        log(f"written: {', '.join(map(str, write_gap(table, place)))}")
        if (place / REPORT).is_file():
            try_report(place, log)
    print(to_json(table) if "--json" in arguments.flags else printable(gap_markdown(table)), end="")
    return 0


def write_merged(adapter: str, out: Path) -> None:
    """Merge an adapter into its base, without measuring, for `evaluate_gap`."""
    from finetune.config.command_options import KlCheckOptions, MergeOptions
    from finetune.export.merge.merge import merge

    merge(MergeOptions(adapter=adapter, out=str(out), kl_check=KlCheckOptions(num_examples=0)), log=lambda text: None)


def _place(options: EvalOptions) -> Path | None:
    """The folder that the files go to: `out`, else the adapter's run; None where there is neither.

    Raises: ConfigError for a place that cannot be written to; IntegrityError if it holds another program's gap.json.
    """
    from finetune.evaluation.gap_table import load_gap

    if options.out is not None:
        folder, word = Path(options.out).expanduser(), f"out={options.out}"
    else:
        folder, word = Path(options.adapter or "").expanduser(), f"adapter={options.adapter}"
        if options.adapter is None or not (folder / "config.yaml").is_file():
            return None
    there = _existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{word}: {there} cannot be written to; name another folder with out=DIR")
    load_gap(folder)
    return folder


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
