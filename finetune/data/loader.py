"""From the data section of a config to documents ready for training, with a count of everything that was left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.batch import Document
from finetune.data.chat import UNTRAINED, ChatTemplate, Encoded
from finetune.data.formats import Message, detect_format, parse_row
from finetune.data.reader import read_rows, resolve_source
from finetune.errors import DataError

_SHOWN_ERRORS = 10


@dataclass
class Source:
    """One file, read and encoded.

    conversations: the readable rows, before any is cut or dropped for length. counts: what happened to rows, by reason.
    """

    name: str
    path: Path
    format: str
    weight: float
    conversations: list[list[Message]]
    documents: list[Document]
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class LoadedData:
    """Everything a run reads. digest: SHA-256 over all training documents' tokens and labels."""

    train: list[Source]
    eval: list[Source]
    digest: str

    @property
    def documents(self) -> list[Document]:
        return [document for source in self.train for document in source.documents]

    @property
    def weights(self) -> list[float]:
        return [source.weight for source in self.train for _ in source.documents]


def load_chat_template(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template a run uses: the tokenizer's, or the jinja file that `data.chat_template` names.

    The tokenizer takes the file's template as its own, so that it is saved with the adapter.
    """
    if cfg.chat_template is not None:
        try:
            tokenizer.chat_template = Path(cfg.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template: {cfg.chat_template} cannot be read: {error}") from error
    return ChatTemplate(tokenizer)


def load_data(cfg: DataConfig, chat: ChatTemplate) -> LoadedData:
    """Read, encode and cut every source.

    Raises: DataError with the first bad rows of every source by place, unless `data.on_bad_row=skip`.
    """
    problems: list[str] = []
    loaded: dict[str, list[Source]] = {"train": [], "eval": []}
    for section, sources in (("train", cfg.train), ("eval", cfg.eval)):
        for i, source in enumerate(sources):
            try:
                loaded[section].append(_load_source(source, cfg, chat))
            except DataError as error:
                problems.append(f"data.{section}[{i}]: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return LoadedData(loaded["train"], loaded["eval"], _digest(loaded["train"]))


def _load_source(source: SourceConfig, cfg: DataConfig, chat: ChatTemplate) -> Source:
    file = resolve_source(source.path, source.split)
    counts: Counter[str] = Counter()
    errors: list[str] = []
    format_name, places, conversations = _read_conversations(source, file, cfg.system, errors)
    encoded = chat.encode(conversations, cfg.train_on)
    documents: list[Document] = []
    for place, result in zip(places, encoded, strict=True):
        if isinstance(result, DataError):
            errors.append(f"{place}: {result}")
            continue
        documents += _fit(result, place, cfg, counts, errors)
    _report_errors(errors, cfg.on_bad_row, counts)
    counts["control tokens kept as text"] = sum(chat.control_tokens_in(m.content) for c in conversations for m in c)
    if not documents:
        why = _describe(counts) or "it is empty"
        raise DataError(f"{file} holds no row to train on ({why}); see data.max_length and data.truncation")
    kept = [c for c, result in zip(conversations, encoded, strict=True) if isinstance(result, Encoded)]
    return Source(source.name or file.stem, file, format_name, source.weight, kept, documents, counts)


def _read_conversations(
    source: SourceConfig, file: Path, system: str | None, errors: list[str]
) -> tuple[str, list[str], list[list[Message]]]:
    format_name = source.format
    places: list[str] = []
    conversations: list[list[Message]] = []
    for row in islice(read_rows(file), source.limit):
        try:
            if isinstance(row.value, DataError):
                raise row.value
            if format_name == "auto" and isinstance(row.value, dict):
                format_name = detect_format(frozenset(row.value), str(file))
            messages = parse_row(row.value, format_name) if format_name != "auto" else parse_row(row.value, "messages")
        except DataError as error:
            errors.append(f"{row.place}: {error}")
            continue
        if system and messages[0].role != "system":
            messages.insert(0, Message("system", system))
        places.append(row.place)
        conversations.append(messages)
    return format_name, places, conversations


def _fit(encoded: Encoded, place: str, cfg: DataConfig, counts: Counter[str], errors: list[str]) -> list[Document]:
    """The document, or what `data.truncation` makes of one that is too long."""
    length, limit = len(encoded.ids), cfg.max_length
    if length <= limit:
        pieces = [slice(0, length)]
    elif cfg.truncation == "error":
        errors.append(f"{place}: has {length} tokens, data.max_length is {limit}; raise it or set data.truncation")
        return []
    else:
        counts[f"longer than {limit} tokens ({cfg.truncation})"] += 1
        pieces = {
            "drop": [],
            "left": [slice(length - limit, length)],
            "right": [slice(0, limit)],
            "split": [slice(start, min(start + limit, length)) for start in range(0, length, limit)],
        }[cfg.truncation]
    documents = [_document(encoded.ids[piece], encoded.trained[piece], place) for piece in pieces]
    trainable = [document for document in documents if document.target_tokens]
    if len(trainable) < len(documents) and not trainable:
        errors.append(f"{place}: no target is left within {limit} tokens; raise data.max_length or set data.truncation")
    return trainable


def _document(ids: np.ndarray, trained: np.ndarray, place: str) -> Document:
    """Shift the targets: position t predicts token t + 1, and nothing is predicted from the last position."""
    labels = np.full(len(ids), UNTRAINED, dtype=np.int32)
    labels[:-1] = np.where(trained[1:], ids[1:], UNTRAINED)
    return Document(ids, labels, place)


def _report_errors(errors: list[str], policy: str, counts: Counter[str]) -> None:
    if errors and policy == "error":
        more = f"\n… and {len(errors) - _SHOWN_ERRORS} more" if len(errors) > _SHOWN_ERRORS else ""
        raise DataError("\n".join(["bad rows (data.on_bad_row=skip leaves them out):", *errors[:_SHOWN_ERRORS]]) + more)
    if errors:
        counts["bad rows skipped"] = len(errors)


def _describe(counts: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items() if count)


def describe_source(source: Source) -> str:
    """One line for the console: rows, tokens, targets and what was left out."""
    tokens = sum(map(len, source.documents))
    targets = sum(d.target_tokens for d in source.documents)
    rows = f"{len(source.conversations):,} rows ({source.format})"
    line = f"{source.name}: {rows}, {tokens:,} tokens, {targets:,} of them targets"
    return f"{line}; {notes}" if (notes := _describe(source.counts)) else line


def _digest(sources: Sequence[Source]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.weight}:{len(source.documents)};".encode())
        for document in source.documents:
            digest.update(len(document).to_bytes(4, "little") + document.ids.tobytes() + document.labels.tobytes())
    return digest.hexdigest()
