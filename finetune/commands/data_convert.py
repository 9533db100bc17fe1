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
from typing import TYPE_CHECKING, Any

from finetune.commands.base import Command
from finetune.system.arguments import Arguments
from finetune.system.atomic import whole_file
from finetune.system.console import log
from finetune.system.errors import DataError, InputError
from finetune.system.format import first_lines

if TYPE_CHECKING:
    from finetune.config.command_options import ConvertOptions
    from finetune.data.sources.readers import RawBatch

_SHOWN_ERRORS = 10


def run(arguments: Arguments) -> int:
    """Write the file and print the number of its rows."""
    options = arguments.options
    if options.weight != 1:
        raise InputError(f"weight: has no effect on a conversion, found {options.weight:g}")
    good, bad, errors = 0, 0, list[str]()
    with whole_file("out", options.out, replace=False) as stream:
        for row in _converted(options):
            if isinstance(row, str):
                bad += 1
                errors += [f"  {row}"] if bad <= _SHOWN_ERRORS else []
            else:
                good += 1
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        listed = "\n".join(["", *first_lines(errors, bad, _SHOWN_ERRORS)])
        wrong = f"{bad:,} of {good + bad:,} rows are bad"
        if bad and options.on_bad_row == "error":
            raise DataError(f"{wrong} (on_bad_row=skip leaves them out):{listed}")
        if bad > options.max_bad_share * (good + bad):
            raise DataError(f"{wrong}, more than max_bad_share={options.max_bad_share:g}:{listed}")
    log(f"{options.out}: {good:,} rows" + (f", {bad:,} bad rows left out:{listed}" if bad else ""))
    return 0


def _converted(source: ConvertOptions) -> Iterator[dict[str, Any] | str]:
    """Yield one row of messages per conversation, or the error of a bad row."""
    from finetune.data.formats.messages import Conversation
    from finetune.data.formats.parser import RowParser, messages_row
    from finetune.data.formats.rules import RowRules

    parser = RowParser(source, rules=RowRules.of(source))
    for batch in _batches(source):
        if batch.format in ("text", "tokens"):
            raise DataError(f"{batch.file}: has no turns to write as messages, found format={batch.format}")
        for row, example in parser.rows(batch):
            is_good = isinstance(example, Conversation)
            yield messages_row(example) if is_good else f"{row.location}: {example}"


def _batches(source: ConvertOptions) -> Iterator[RawBatch]:
    from finetune.data.formats.detection import with_formats
    from finetune.data.sources.paths import resolve_source

    batches = resolve_source(source).batches(source.limit)
    if source.answers is None:
        return with_formats(source, batches)
    from finetune.migration.batch_api import join_answers

    return join_answers(batches, source.answers)


COMMAND = Command("data convert", __doc__, run, options="ConvertOptions")
