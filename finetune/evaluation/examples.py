"""The held-out data that models are compared on: rows of the task, and rows that training should not harm."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune.config.command_options import EvalOptions
from finetune.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig
from finetune.data.documents import Documents
from finetune.data.formats.messages import Conversation
from finetune.data.loader import first_conversations, load_data, load_media_processor
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.system.errors import ConfigError, DataError

# Formats of rows without a question.
_NO_QUESTION = frozenset({"text", "tokens"})
_FEW_ROWS = 20


@dataclass(frozen=True)
class RowSet:
    """documents: to score. conversations: the first rows, to answer; empty for formats without a question."""

    name: str
    documents: Documents
    conversations: list[Conversation]
    forgetting: bool

    @property
    def rows(self) -> int:
        return len(np.unique(self.documents.rows))

    def describe(self) -> str:
        """Return a line for the log."""
        targets, forgetting = int(self.documents.targets.sum()), ", forgetting=true" if self.forgetting else ""
        answered = len(self.conversations)
        return f"{self.name}: rows={self.rows:,}, answered={answered:,}, targets={targets:,}{forgetting}"


def load_sets(options: EvalOptions, cfg: RunConfig | None, chat: ChatTemplate, model: ModelConfig) -> list[RowSet]:
    """Load the sets of `data` and `forgetting`, tokenized as in the adapter's run.

    cfg: of that run, if there is one. model: whose rows they are.
    Raises:
        ConfigError: there are no rows.
        DataError: a row is invalid.
    """
    chosen = options.data
    parts = [("data", _alone(chosen or [], options.limit)), ("forgetting", _alone(options.forgetting, options.limit))]
    if chosen is None and cfg is not None:  # The files that it was trained on may be gone.
        parts.insert(0, ("data.eval", _alone(cfg.data.eval, None) or ({} if cfg.data.held_out else None)))
    sets, problems = [], []
    for word, changes in parts:
        if changes is not None:
            try:
                sets += _sets(changes, cfg, chat, options, model=model, forgetting=word == "forgetting")
            except DataError as error:
                problems.append(str(error).replace("data.eval[", f"{word}[").replace("data.on_bad_row", "on_bad_row"))
    if problems:
        raise DataError("\n".join(problems))
    if not options.tasks and all(rows.forgetting for rows in sets):
        if chosen is not None:
            problem = "data: the list is empty, and there are no tasks"
        elif cfg is None:
            problem = "data: this adapter has no run with a held-out set"
        else:
            problem = "data.eval: the run that trained this adapter has no held-out set"
        raise ConfigError(f"{problem}\nhelp: pass data=[{{path: heldout.jsonl}}]")
    seen: Counter[str] = Counter()
    for i, rows in enumerate(sets):
        seen[rows.name] += 1
        if seen[rows.name] > 1:
            sets[i] = replace(rows, name=f"{rows.name}-{seen[rows.name]}")
    return sets


def data_warnings(options: EvalOptions, cfg: RunConfig | None, sets: Sequence[RowSet]) -> Iterator[str]:
    """Yield warnings about data that make figures misleading, such as training rows among the held-out ones."""
    trained = {_file(source) for source in cfg.data.train} if cfg is not None else set()
    for word, sources in (("data", options.data or []), ("forgetting", options.forgetting)):
        for i, source in enumerate(sources):
            if _file(source) in trained:
                yield f"{word}[{i}]: the run was trained on {source.path}; use held-out rows"
    known = {text for rows in sets if not rows.forgetting for text in _texts(rows)}
    for rows in sets:
        if rows.forgetting and (again := sum(text in known for text in _texts(rows))):
            yield f"forgetting: {again:,} texts of {rows.name} are rows of the task too; use other rows"
    for rows in sets:
        if bad := sum(store.meta.bad_rows for store in rows.documents.stores):
            yield f"{rows.name}: skipped {bad:,} invalid rows"
        if rows.rows < _FEW_ROWS:
            yield f"{rows.name}: too few rows for a reliable interval, found {rows.rows}"


def _texts(rows: RowSet) -> list[bytes]:
    return [hashlib.sha256(document.ids.tobytes()).digest() for document in rows.documents]


def _file(source: SourceConfig) -> tuple[str, str | None]:
    return os.path.realpath(os.path.expanduser(source.path)), source.split


def _alone(sources: list[SourceConfig], limit: int | None) -> dict[str, Any] | None:
    """Changes of a run's data section that leave these sources only; streamed training rows are not read."""
    if limit is not None:
        sources = [source.model_copy(update={"limit": min(limit, source.limit or limit)}) for source in sources]
    return {"train": sources, "eval": sources, "held_out": 0.0, "stream_rows": 1} if sources else None


def read_for_scoring(cfg: RunConfig | None) -> tuple[str, dict[str, Any]]:
    """Return how rows are read to score the model of a run: the objective of `Preparation`, and changes of its data."""
    if cfg is None:
        return "none", {}
    bad_answers_are_left_out = {"on_bad_row": "skip", "max_bad_share": 1.0}
    return cfg.scored_rows, bad_answers_are_left_out if cfg.preference.objective == "kto" else {}


def _sets(
    changes: dict[str, Any],
    cfg: RunConfig | None,
    chat: ChatTemplate,
    options: EvalOptions,
    *,
    model: ModelConfig,
    forgetting: bool,
) -> list[RowSet]:
    plain: dict[str, Any] = {"stream_rows": None, "chat_template": None}  # the tokenizer has the run's template
    objective, changed = read_for_scoring(cfg)
    plain |= changed
    if options.on_bad_row is not None:
        plain |= {"on_bad_row": options.on_bad_row, "max_bad_share": 1.0}
    data = DataConfig(**{**plain, **changes}) if cfg is None else cfg.data.model_copy(update={**plain, **changes})
    preparation = Preparation(data, chat, objective=objective, media=load_media_processor(model, data))
    count = min(options.answers, options.limit or options.answers)
    sets = []
    for source in load_data(preparation).eval:
        documents = source.documents
        if options.limit is not None:
            documents = documents.select(np.isin(documents.rows, source.rows[: options.limit]))
        has_question = not forgetting and not _NO_QUESTION & {*source.store.meta.formats}
        conversations = first_conversations(source, preparation, count) if has_question and count else []
        sets.append(RowSet(source.name, documents, conversations, forgetting))
    return sets
