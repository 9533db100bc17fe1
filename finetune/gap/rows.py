"""The rows that models are compared on: those of the task, and others that it should not harm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.config.commands import EvalOptions
from finetune.config.schema import DataConfig, RunConfig, SourceConfig
from finetune.data.documents import Documents
from finetune.data.formats.messages import Conversation
from finetune.data.loader import Source, first_conversations, load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.errors import ConfigError

# Formats of rows that ask nothing.
_NO_QUESTION = ("text", "tokens")


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
    """The sets of `data` and `forgetting`, tokenised as the adapter's run tokenises. cfg: of that run, if there is one.

    Raises: ConfigError without any rows; DataError for rows that cannot be used.
    """
    chosen = options.data
    own = _own_sources(cfg) if chosen is None and cfg is not None else None
    parts = [
        (own, False),
        (_alone(_limited(chosen or [], options.limit)), False),
        (_alone(_limited(options.forgetting, options.limit)), True),
    ]
    sets = [one for changes, forgetting in parts if changes is not None
            for one in _sets(changes, cfg, chat, options, forgetting)]  # fmt: skip
    if not options.tasks and all(rows.forgetting for rows in sets):
        why = "is empty" if chosen is not None else "is missing: no run comes with this adapter"
        if chosen is None and cfg is not None:
            why = "is missing: the adapter's run holds no rows back"
        raise ConfigError(f"data: {why}; name held-out rows with 'data=[{{path: rows.jsonl}}]'")
    return _named_apart(sets)


def _alone(sources: list[SourceConfig]) -> dict[str, Any] | None:
    """These sources and no others, as changes of a run's data section."""
    return {"train": sources, "eval": sources, "held_out": 0.0} if sources else None


def _own_sources(cfg: RunConfig) -> dict[str, Any] | None:
    """What a run itself evaluates on, as changes of its data section."""
    if cfg.data.eval:  # its training rows need not even be there any more
        return {"train": cfg.data.eval, "held_out": 0.0}
    return {} if cfg.data.held_out else None


def _limited(sources: Sequence[SourceConfig], limit: int | None) -> list[SourceConfig]:
    if limit is None:
        return list(sources)
    return [source.model_copy(update={"limit": min(limit, source.limit or limit)}) for source in sources]


def _sets(
    changes: dict[str, Any], cfg: RunConfig | None, chat: ChatTemplate, options: EvalOptions, forgetting: bool
) -> list[RowSet]:
    plain = {"stream_rows": None, "chat_template": None}  # the template is the tokenizer's, which has the run's
    data = DataConfig(**changes) if cfg is None else cfg.data.model_copy(update={**changes, **plain})
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
