"""usage: finetune data config=X.yaml [key=value …] [show=N] [html=FILE] [dump=FILE.jsonl]
       finetune data convert path=FILE out=messages.jsonl      (finetune data convert --help)

Reads the rows of a config as training does and reports formats, lengths, trained tokens, duplicates, rows in both
training and evaluation, truncated and dropped rows, the packing of an epoch, lengths and labels of preferences, and
with rewards the prompts that leave no room for an answer. No model is loaded.
dump= writes every row of data.train, then of data.eval, truncated to data.max_length and not yet packed, as
{"source", "row", "input_ids", "labels"}; labels are not shifted, and -100 for tokens that are not trained. A pair is
one row: its first "chosen_tokens" tokens are the chosen answer with its prompt, the others the rejected one.

Examples
  finetune data config=quickstart.yaml
  finetune data config=your-data.yaml data.train=rows.jsonl show=3
  finetune data config=dpo.yaml data.train=pairs.jsonl data.eval=[] show=3
  finetune data config=lora.yaml data.train=rows.jsonl data.max_length=4096 html=report.html
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.atomic import whole_file
from finetune.system.console import log
from finetune.system.errors import InputError

if TYPE_CHECKING:
    from finetune.config.command_options import DataOptions
    from finetune.config.schema import RunConfig

_PAGE_ROWS = 10


def run(arguments: Arguments) -> int:
    """Print the report, and write the files that html= and dump= name."""
    from finetune.config.compose import load_config

    options = arguments.options
    cfg = load_config(str(arguments.config), arguments.overrides)

    from finetune.data.early_checks import check_inputs

    check_inputs(cfg)
    # Rows hold characters that some terminals cannot show.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    paths = {word: path for word, path in (("html", options.html), ("dump", options.dump)) if path is not None}
    with ExitStack() as stack:
        files = {word: stack.enter_context(whole_file(word, path)) for word, path in paths.items()}
        _inspect(cfg, options, files)
    for word, path in paths.items():
        log(f"{word}: {path}")
    return 0


def _inspect(cfg: RunConfig, options: DataOptions, files: dict[str, IO[str]]) -> None:
    from finetune.data.loader import advice_on_end_token, load_all_rows
    from finetune.data.sources.paths import resolve_source
    from finetune.report.dataset.advice import advise
    from finetune.report.dataset.examples import Decoder, shown_rows
    from finetune.report.dataset.files import write_dump, write_page
    from finetune.report.dataset.statistics import build_report
    from finetune.report.dataset.terminal import print_report, print_rows
    from finetune.system.console import console_for

    tokenizer, chat, data = load_all_rows(cfg, log)
    read = {file.resolve() for s in (*data.train, *data.eval) for file in resolve_source(s.config).files}
    for word, path in (("html", options.html), ("dump", options.dump)):
        if path is not None and Path(path).expanduser().resolve() in read:
            raise InputError(f"{word}={path}: holds rows of the config\nhelp: name another file")
    decoder = Decoder.of(tokenizer)
    report = build_report(data, cfg, chat)
    advice = advise(report, cfg, advice_on_end_token(chat))

    console = console_for(sys.stdout)
    print_report(console, report, advice)
    names = [source.name for source in data.train]
    rows = shown_rows(names, data.documents, decoder, options.show or _PAGE_ROWS)
    if options.show:
        console.print()
        # With rewards the model writes answers of its own.
        print_rows(console, rows, "targets" if report.prompts is None else "expected answers")
    if "html" in files:
        write_page(files["html"], report, advice, rows)
    if "dump" in files:
        write_dump(files["dump"], data)


COMMAND = Command("data", __doc__, run, options="DataOptions", config="required")
