"""The rows that models are compared on: those of the task, and others that it should not harm."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.config.command_options import EvalOptions
from finetune.config.schema import DataConfig, RunConfig, SourceConfig
from finetune.data.documents import Documents
from finetune.data.formats.messages import Conversation
from finetune.data.loader import Source, first_conversations, load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.system.errors import ConfigError, DataError

# Formats of rows that ask nothing.
_NO_QUESTION = ("text", "tokens")
_FEW_ROWS = 20


@dataclass(frozen=True)
class RowSet:
    """documents: what is scored. conversations: what is answered, the first rows; none of rows that ask nothing."""

    name: str
    documents: Documents
    conversations: list[Conversation]
    forgetting: bool

    @property
    def rows(self) -> int:
        return len(np.unique(self.documents.rows))


def load_sets(options: EvalOptions, cfg: RunConfig | None, chat: ChatTemplate) -> list[RowSet]:
    """The sets of `data` and `forgetting`, tokenized as the adapter's run tokenizes. cfg: of that run, if there is one.

    Raises: ConfigError without any rows; DataError for rows that cannot be used.
    """
    chosen = options.data
    own = _own_sources(cfg) if chosen is None and cfg is not None else None
    parts = [
        ("data.eval", own, False),
        ("data", _alone(_limited(chosen or [], options.limit)), False),
        ("forgetting", _alone(_limited(options.forgetting, options.limit)), True),
    ]
    sets, problems = [], []
    for word, changes, forgetting in parts:
        if changes is not None:
            try:
                sets += _sets(changes, cfg, chat, options, forgetting)
            except DataError as error:
                problems.append(str(error).replace("data.eval[", f"{word}[").replace("data.on_bad_row", "on_bad_row"))
    if problems:
        raise DataError("\n".join(problems))
    if not options.tasks and all(rows.forgetting for rows in sets):
        why = "is empty" if chosen is not None else "is missing: no run comes with this adapter"
        if chosen is None and cfg is not None:
            why = "is missing: the adapter's run holds no rows back"
        raise ConfigError(f"data: {why}; name held-out rows with 'data=[{{path: rows.jsonl}}]'")
    return _named_apart(sets)


def data_warnings(options: EvalOptions, cfg: RunConfig | None, sets: Sequence[RowSet]) -> Iterator[str]:
    """What makes figures say something else than they seem to: rows that were trained on, or that are in two sets."""
    trained = {_file(source) for source in cfg.data.train} if cfg is not None else set()
    for word, sources in (("data", options.data or []), ("forgetting", options.forgetting)):
        for i, source in enumerate(sources):
            if _file(source) in trained:
                yield f"{word}[{i}]: {source.path} is what the run was trained on; rows held back would say more"
    known = {text for rows in sets if not rows.forgetting for text in _texts(rows)}
    for rows in sets:
        if rows.forgetting and (again := sum(text in known for text in _texts(rows))):
            yield f"forgetting: {again:,} texts of {rows.name} are the task's own; others would tell what was lost"
    for rows in sets:
        if bad := sum(store.meta.bad_rows for store in rows.documents.stores):
            yield f"{rows.name}: {bad:,} row(s) cannot be used and are left out"
        if rows.rows < _FEW_ROWS:
            yield f"{rows.name}: {rows.rows} row(s) are too few for an interval to be trusted"


def _texts(rows: RowSet) -> list[bytes]:
    return [hashlib.sha256(document.ids.tobytes()).digest() for document in rows.documents]


def _file(source: SourceConfig) -> tuple[str, str | None]:
    return os.path.realpath(os.path.expanduser(source.path)), source.split


def _alone(sources: list[SourceConfig]) -> dict[str, Any] | None:
    """These sources and no others, as changes of a run's data section: what is streamed is not read beforehand."""
    return {"train": sources, "eval": sources, "held_out": 0.0, "stream_rows": 1} if sources else None


def _own_sources(cfg: RunConfig) -> dict[str, Any] | None:
    """What a run itself evaluates on, as changes of its data section."""
    if cfg.data.eval:  # its training rows need not even be there any more
        return _alone(cfg.data.eval)
    return {} if cfg.data.held_out else None


def _limited(sources: Sequence[SourceConfig], limit: int | None) -> list[SourceConfig]:
    if limit is None:
        return list(sources)
    return [source.model_copy(update={"limit": min(limit, source.limit or limit)}) for source in sources]


def _sets(
    changes: dict[str, Any], cfg: RunConfig | None, chat: ChatTemplate, options: EvalOptions, forgetting: bool
) -> list[RowSet]:
    plain: dict[str, Any] = {"stream_rows": None, "chat_template": None}  # the tokenizer has the run's template
    if options.on_bad_row is not None:
        plain |= {"on_bad_row": options.on_bad_row, "max_bad_share": 1.0}
    data = DataConfig(**{**plain, **changes}) if cfg is None else cfg.data.model_copy(update={**plain, **changes})
    preparation = Preparation(data, chat)
    return [_set(source, preparation, options, forgetting) for source in load_data(preparation).eval]


def _set(source: Source, preparation: Preparation, options: EvalOptions, forgetting: bool) -> RowSet:
    documents = source.documents
    if options.limit is not None:
        documents = documents.select(np.isin(documents.rows, source.rows[: options.limit]))
    asks = not forgetting and source.store.format not in _NO_QUESTION
    count = min(options.answers, options.limit or options.answers)
    conversations = first_conversations(source, preparation, count) if asks and count else []
    return RowSet(source.name, documents, conversations, forgetting)


def _named_apart(sets: Sequence[RowSet]) -> list[RowSet]:
    """Sets of one name get numbers."""
    seen: dict[str, int] = {}
    named = []
    for rows in sets:
        seen[rows.name] = number = seen.get(rows.name, 0) + 1
        name = rows.name if number == 1 else f"{rows.name}-{number}"
        named.append(RowSet(name, rows.documents, rows.conversations, rows.forgetting))
    return named
