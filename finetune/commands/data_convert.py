"""usage: finetune data convert path=ROWS out=messages.jsonl [key=value …]
       finetune data convert path=REQUESTS answers=ANSWERS out=messages.jsonl

Writes the conversations of a source as messages JSONL, one row per line:
{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}. Never replaces an existing file.
answers: joins the requests of OpenAI's batch API with its answers, by their custom_id.

Examples
  finetune data convert path=alpaca.json out=messages.jsonl
  finetune data convert path=rows.csv out=messages.jsonl 'columns={prompt: question, completion: answer}'
  finetune data convert path=chats.jsonl.gz out=messages.jsonl 'roles={assistant: [agent, bot]}' limit=1000
  finetune data convert path=requests.jsonl answers=batch_output.jsonl out=messages.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.atomic import whole_file
from finetune.system.console import log
from finetune.system.errors import DataError, InputError

if TYPE_CHECKING:
    from finetune.config.command_options import ConvertOptions
    from finetune.data.sources.readers import RawBatch

_SHOWN_ERRORS = 10


@dataclass
class _Rows:
    """Counts of rows, and the first errors."""

    good: int = 0
    bad: int = 0
    errors: list[str] = field(default_factory=list)

    def refuse(self, error: str) -> None:
        self.bad += 1
        if self.bad <= _SHOWN_ERRORS:
            self.errors.append(error)

    def listed(self) -> str:
        more = f"\n  … and {self.bad - len(self.errors):,} more" if self.bad > len(self.errors) else ""
        return "\n  ".join(["", *self.errors]) + more


def run(arguments: Arguments) -> int:
    """Write the file and print the number of its rows."""
    options = arguments.options
    if options.weight != 1:
        raise InputError(f"weight: has no effect on a conversion, found {options.weight:g}")
    rows = _Rows()
    with whole_file("out", options.out, replace=False) as stream:
        for row in _converted(options, rows):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        total = rows.good + rows.bad
        wrong = f"{rows.bad:,} of {total:,} rows are bad"
        if rows.bad and options.on_bad_row == "error":
            raise DataError(f"{wrong} (on_bad_row=skip leaves them out):{rows.listed()}")
        if rows.bad > options.max_bad_share * total:
            raise DataError(f"{wrong}, more than max_bad_share={options.max_bad_share:g}:{rows.listed()}")
    skipped = f", {rows.bad:,} bad rows left out:{rows.listed()}" if rows.bad else ""
    log(f"{options.out}: {rows.good:,} rows{skipped}")
    return 0


def _converted(source: ConvertOptions, rows: _Rows) -> Iterator[dict[str, Any]]:
    """Yield one row of messages per conversation; count bad rows in `rows`."""
    from finetune.data.formats.messages import Conversation
    from finetune.data.formats.parser import RowParser, messages_row
    from finetune.data.formats.rules import RowRules

    parser = RowParser(source, rules=RowRules.of(source))
    for batch in _batches(source):
        if batch.format in ("text", "tokens"):
            raise DataError(f"{batch.file}: has no turns to write as messages, found format={batch.format}")
        for row, example in parser.rows(batch):
            if isinstance(example, Conversation):
                rows.good += 1
                yield messages_row(example)
            else:
                rows.refuse(f"{row.location}: {example}")


def _batches(source: ConvertOptions) -> Iterator[RawBatch]:
    from finetune.data.formats.detection import with_formats
    from finetune.data.sources.paths import resolve_source

    batches = resolve_source(source).batches(source.limit)
    if source.answers is None:
        return with_formats(source, batches)
    from finetune.migration.batch_api import join_answers

    return join_answers(batches, source.answers)


COMMAND = Command("data convert", __doc__, run, options="ConvertOptions")
