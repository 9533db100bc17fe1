"""`finetune data convert`: rows of any chat format, written as messages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.system.arguments import Arguments, nearest
from finetune.system.atomic import whole_file
from finetune.system.errors import DataError, InputError

if TYPE_CHECKING:
    from finetune.config.schema import DataConfig, SourceConfig
    from finetune.data.formats.messages import Conversation
    from finetune.data.formats.parser import RowParser

HELP = """\
usage: finetune data convert path=ROWS out=messages.jsonl [key=value …]

Writes the conversations of any source that can be read as messages JSONL, a row a line:
{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}. An existing file is not replaced.
  path=ROWS          a file (jsonl, json, csv, parquet, arrow; also compressed), a glob, a folder, or a hub id
  out=FILE           the file to write
  format= split= subset= revision= limit= columns= roles=    as in an item of data.train
  on_bad_row=skip    leave out rows that cannot be used, at most max_bad_share=0.05 of them

Examples
  finetune data convert path=alpaca.json out=messages.jsonl
  finetune data convert path=rows.csv out=messages.jsonl 'columns={prompt: question, completion: answer}'
  finetune data convert path=chats.jsonl.gz out=messages.jsonl 'roles={assistant: [agent, bot]}' limit=1000"""

_OF_SOURCE = ("path", "format", "split", "subset", "revision", "limit", "columns", "roles")
_OF_DATA = ("on_bad_row", "max_bad_share")
_SHOWN_ERRORS = 10


@dataclass
class _Rows:
    """Rows read so far, and the first of those that could not be used."""

    good: int = 0
    bad: int = 0
    errors: list[str] = field(default_factory=list)

    def refuse(self, error: str) -> None:
        self.bad += 1
        if len(self.errors) < _SHOWN_ERRORS:
            self.errors.append(error)

    def listed(self) -> str:
        more = f"\n  … and {self.bad - len(self.errors):,} more" if self.bad > len(self.errors) else ""
        return "\n  ".join(["", *self.errors]) + more


def run_convert(arguments: Arguments) -> int:
    """`finetune data convert`. Raises: InputError for words that cannot be meant, DataError for rows that cannot."""
    own, others = arguments.split(("out",))
    if arguments.config is not None:
        raise InputError("finetune data convert takes no config; name the rows with path=ROWS")
    if "out" not in own or not any(word.startswith("path=") for word in others):
        raise InputError("finetune data convert needs path=ROWS and out=messages.jsonl")
    data = _settings(others)
    rows = _Rows()
    with whole_file("out", own["out"], replace=False) as stream:
        for row in _converted(data.train[0], rows):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        _judge(rows, data)
    skipped = f", {rows.bad:,} bad rows left out:{rows.listed()}" if rows.bad else ""
    print(f"{own['out']}: {rows.good:,} rows{skipped}", file=sys.stderr)
    return 0


def _converted(source: SourceConfig, rows: _Rows) -> Iterator[dict[str, Any]]:
    """A row of messages for every conversation; what cannot be used is noted in `rows`."""
    from finetune.data.formats.parser import messages_row
    from finetune.data.sources.paths import read_rows

    parser = None
    for row in read_rows(source):
        try:
            if isinstance(row.value, DataError):
                raise row.value
            parser = parser or _parser(source, row.value)
            conversation = _conversation(parser, row.value)
        except DataError as error:
            if parser is None and not isinstance(row.value, DataError):
                raise
            rows.refuse(f"{row.location}: {error}")
            continue
        rows.good += 1
        yield messages_row(conversation)


def _parser(source: SourceConfig, first: Any) -> RowParser:
    from finetune.data.formats.parser import RowParser, resolve_format

    name = resolve_format(source, first, source.path)
    if name in ("text", "tokens"):
        what = "raw text" if name == "text" else "tokens"
        raise DataError(f"{source.path} holds {what} (format={name}), which has no turns to write as messages")
    return RowParser(source, name)


def _conversation(parser: RowParser, value: Any) -> Conversation:
    from finetune.data.formats.messages import Conversation

    example = parser.parse(value)
    if not isinstance(example, Conversation):
        raise DataError("is no conversation")
    return example


def _judge(rows: _Rows, data: DataConfig) -> None:
    total = rows.good + rows.bad
    if rows.bad and data.on_bad_row == "error":
        raise DataError(f"{rows.bad:,} of {total:,} rows are bad (on_bad_row=skip leaves them out):{rows.listed()}")
    if rows.bad > data.max_bad_share * total:
        raise DataError(
            f"{rows.bad:,} of {total:,} rows are bad, more than max_bad_share={data.max_bad_share:g}:{rows.listed()}"
        )


def _settings(words: list[str]) -> DataConfig:
    """The source and the policy, checked as the items of data.train are."""
    from pydantic import ValidationError

    from finetune.config.explain import problems_of
    from finetune.config.overrides import parse_overrides
    from finetune.config.schema import RunConfig

    lines = [_full(word) for word in words]
    edits = parse_overrides(lines)
    tree: dict[str, Any] = {"model": {"name": "none"}, "data": {"train": [{}]}}
    for key, value in edits.values:
        *way, last = key.removeprefix("data.").removeprefix("train.0.").split(".", 1)
        node = tree["data"]["train"][0] if key.startswith("data.train.0.") else tree["data"]
        for step in way:
            node = node.setdefault(step, {})
        node[last] = value
    problems = list(edits.problems)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems += problems_of(tree, error)
    else:
        if not problems:
            return config.data
    told = [f"{problem.key}: {problem.text}".replace("data.train.0.", "") for problem in problems]
    raise InputError(told[0] if len(told) == 1 else "\n  ".join(["the command line has errors:", *told]))


def _full(word: str) -> str:
    """A word as an override of a run's config. Raises: InputError if it is none of ours."""
    key = word.partition("=")[0].partition(".")[0]
    if key in _OF_SOURCE:
        return f"data.train.0.{word}"
    if key in _OF_DATA:
        return f"data.{word}"
    known = (*_OF_SOURCE, "out", *_OF_DATA)
    advice = nearest(key, known) or f"; this command has {', '.join(known)}"
    raise InputError(f"unknown word {key}{advice}")
