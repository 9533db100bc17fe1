"""`finetune data`: what a config's rows are and what they become, before anything is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from finetune.system.arguments import Arguments, nearest
from finetune.system.atomic import whole_file
from finetune.system.errors import InputError

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig
    from finetune.data.loader import LoadedData

HELP = """\
usage: finetune data config=X.yaml [key=value …] [show=N] [html=FILE] [dump=FILE.jsonl]
       finetune data convert path=FILE out=messages.jsonl      (finetune data convert --help)

Reads the rows of a config as training would and reports on them: formats, lengths, targets, duplicates, rows that are
in training and evaluation alike, what is cut or left out, and how an epoch is packed. No model is loaded.
  show=N            print N training rows, evenly spaced, with their targets colored
  html=FILE         write the report with the rows (10, or show=N) as one page
  dump=FILE.jsonl   write every row of data.train, then of data.eval, cut to data.max_length and not yet packed, as
                    {"source", "row", "input_ids", "labels"}; labels are not shifted, and -100 where untrained

Examples
  finetune data config=quickstart.yaml
  finetune data config=your-data.yaml 'data.train=[{path: rows.jsonl}]' show=3
  finetune data config=lora.yaml data.max_length=4096 html=report.html"""

OWN = ("show", "html", "dump")
_PAGE_ROWS = 10


@dataclass(frozen=True, slots=True)
class DataSettings:
    """show: rows to print, 0 for none; html, dump: files to write."""

    show: int = 0
    html: str | None = None
    dump: str | None = None


def run_data(arguments: Arguments) -> int:
    """`finetune data`. Raises: InputError for words that cannot be meant, DataError for rows that cannot be used."""
    from finetune.config.compose import load_config

    own, overrides = arguments.split(OWN)
    settings = _settings(own)
    _refuse_near_misses(overrides)
    if arguments.config is None:
        raise InputError("finetune data needs config=X.yaml, as in: finetune data config=quickstart.yaml show=3")
    cfg = load_config(arguments.config, overrides)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] - rows hold what no terminal may be able to show
    with ExitStack() as stack:
        files = {
            word: stack.enter_context(whole_file(word, path))
            for word, path in (("html", settings.html), ("dump", settings.dump))
            if path is not None
        }
        _inspect(cfg, settings, files)
    for word in files:
        print(f"{word}: {own[word]}", file=sys.stderr)
    return 0


def _inspect(cfg: RunConfig, settings: DataSettings, files: dict[str, IO[str]]) -> None:
    from finetune.data.loader import check_sources, load_chat_template, load_data

    check_sources(cfg.data)

    from finetune.data.template.chat import advice_on_end_token
    from finetune.data.tokens.prepare import Preparation, console_progress
    from finetune.models.load import load_tokenizer
    from finetune.models.tokens import extend_tokenizer
    from finetune.report.dataset.advice import advise
    from finetune.report.dataset.dump import write_dump
    from finetune.report.dataset.examples import Decoder, shown_rows
    from finetune.report.dataset.page import write_page
    from finetune.report.dataset.statistics import build_report
    from finetune.report.dataset.text import console_for, print_report, print_rows

    tokenizer = load_tokenizer(cfg.model)
    extend_tokenizer(tokenizer, cfg.lora.new_tokens)
    chat = load_chat_template(cfg.data, tokenizer)
    # All rows are looked at, also those that training would read a window at a time.
    whole = cfg.data.model_copy(update={"stream_rows": None})
    data = load_data(Preparation(whole, chat, progress=console_progress(_say)))
    _keep_rows(data, settings)
    decoder = Decoder.of(tokenizer)
    report = build_report(data, cfg, chat)
    advice = advise(report, cfg, advice_on_end_token(chat))

    console = console_for(sys.stdout)
    print_report(console, report, advice)
    names = [source.name for source in data.train]
    rows = shown_rows(names, data.documents, decoder, settings.show or _PAGE_ROWS)
    if settings.show:
        console.print()
        print_rows(console, rows)
    if "html" in files:
        write_page(files["html"], report, advice, rows)
    if "dump" in files:
        write_dump(files["dump"], data)


def _keep_rows(data: LoadedData, settings: DataSettings) -> None:
    """Raises: InputError if a file to write is one that rows are read from."""
    from finetune.data.sources.paths import resolve_source

    read = {file.resolve() for s in (*data.train, *data.eval) for file in resolve_source(s.config).files}
    for word, path in (("html", settings.html), ("dump", settings.dump)):
        if path is not None and Path(path).expanduser().resolve() in read:
            raise InputError(f"{word}={path}: rows are read from there; name another file")


def _settings(own: dict[str, str]) -> DataSettings:
    show = own.get("show", "0")
    if not (show.isascii() and show.isdecimal()):
        raise InputError(f"show must be a whole number of rows, got {show!r}; write show=3")
    return DataSettings(int(show), own.get("html"), own.get("dump"))


def _refuse_near_misses(overrides: Iterable[str]) -> None:
    """A misspelt word of the command would otherwise be looked up among the settings of a run."""
    from finetune.config.keys import find

    for word in overrides:
        key = word.partition("=")[0]
        if "." not in key and find(key) is None and (close := nearest(key, OWN)):
            raise InputError(f"unknown word {key}{close}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
