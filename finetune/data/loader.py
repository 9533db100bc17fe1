"""Load the data section of a config as documents for training, and count everything that is left out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig
from finetune.data.documents import Cut, Documents, cut_to_length
from finetune.data.formats.messages import Conversation, Example, Preference
from finetune.data.formats.preferences import verdict_of
from finetune.data.media.processor import MediaProcessor, build_media_processor
from finetune.data.sources.paths import resolve_source
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation, console_progress
from finetune.data.tokens.store import BAD_ROWS, TokenStore
from finetune.models.families import FAMILIES
from finetune.system.atomic import write_text
from finetune.system.console import Log
from finetune.system.errors import DataError
from finetune.system.format import first_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_ERRORS = 10
HELD_OUT = "held_out"


@dataclass(frozen=True)
class Source:
    """One item of data.train or data.eval, tokenized, or its held-out rows.

    store: every usable row, before any cut.
    documents: for training or evaluation.
    counts: rows left out or changed, by reason.
    held_out: what `data.held_out` took, for held-out rows of a training source.
    """

    name: str
    config: SourceConfig
    store: TokenStore
    documents: Documents
    counts: Counter[str]
    held_out: str = ""

    @property
    def rows(self) -> np.ndarray:
        """Rows of the store with a document [R], ascending."""
        return np.unique(self.documents.rows)


@dataclass(frozen=True)
class LoadedData:
    """The data of a run. digest: SHA-256 of the tokens, labels and copies of all training documents."""

    train: list[Source]
    eval: list[Source]
    digest: str

    @cached_property
    def documents(self) -> Documents:
        return Documents.join(source.documents for source in self.train)

    @property
    def every_document(self) -> Documents:
        """The documents of training and evaluation."""
        return Documents.join(source.documents for source in (*self.train, *self.eval))

    @cached_property
    def weights(self) -> np.ndarray:
        """Copies [M] of each training document per epoch."""
        return np.concatenate([np.full(len(source.documents), source.config.weight) for source in self.train])

    @property
    def stores(self) -> list[TokenStore]:
        """Each store once: held-out rows are in the store of their source."""
        return list({source.store.folder: source.store for source in (*self.train, *self.eval)}.values())


def load_all_rows(cfg: RunConfig, log: Log) -> tuple[PreTrainedTokenizerBase, ChatTemplate, LoadedData]:
    """Load the tokenizer, the template and every row of a run's config, also rows that training streams.

    Raises: as `load_data`.
    """
    from finetune.models.tokenizer import extend_tokenizer, load_tokenizer  # imports transformers

    tokenizer = load_tokenizer(cfg.model)
    extend_tokenizer(tokenizer, cfg.lora.new_tokens)
    chat = load_chat_template(cfg.data, tokenizer)
    whole = cfg.data.model_copy(update={"stream_rows": None})
    media = load_media_processor(cfg.model, whole)
    preparation = Preparation(whole, chat, progress=console_progress(log), objective=cfg.row_objective, media=media)
    return tokenizer, chat, load_data(preparation)


def load_media_processor(model: ModelConfig, data: DataConfig) -> MediaProcessor | None:
    """Build what reads the media of rows for a model; None if the model reads text only. Raises: ConfigError."""
    from finetune.models.hub import find_texts, read_config  # imports huggingface_hub

    folder = find_texts(model.name, model.revision, "model.name").folder
    family = FAMILIES[read_config(folder, model.name)["model_type"]]
    return build_media_processor(family, folder, data) if family.towers else None


def load_chat_template(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Load the chat template of a run: the tokenizer's, or the jinja file in `data.chat_template`.

    The file's template is set on the tokenizer, so that it is saved with the adapter.
    """
    if cfg.chat_template is not None:
        try:
            tokenizer.chat_template = Path(cfg.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template: {cfg.chat_template} cannot be read: {error}") from error
    return ChatTemplate(tokenizer)


def advice_on_end_token(chat: ChatTemplate) -> str | None:
    """Return a warning if the template ends turns with a token that is not the tokenizer's end token, else None.

    That is the case of base models: the row of this token in the head was never trained.
    """
    if chat.turn_end_id in (None, chat.eos_id):
        return None
    turn_end, eos = (chat.token_of(i) for i in (chat.turn_end_id, chat.eos_id))
    return (
        f"the chat template ends a turn with {turn_end}, but the tokenizer's end token is {eos}: this is a base model. "
        f"Its head never learned to write {turn_end}, and adapters on its layers cannot teach it, so answers may not "
        "stop; start from an Instruct model, or train the head as well: lora.modules_to_save=[lm_head] (a tied "
        "embedding learns with it)"
    )


def load_data(preparation: Preparation) -> LoadedData:
    """Tokenize every source, or find it in the cache; cut and split it.

    Raises: DataError with the first bad rows of every source, unless `data.on_bad_row=skip`.
    """
    cfg = preparation.cfg
    problems: list[str] = []
    train: list[Source] = []
    held_out: list[Source] = []
    evaluation: list[Source] = []
    # stream.py tokenizes streamed rows while training.
    for section, sources in (("train", [] if cfg.stream_rows else cfg.train), ("eval", cfg.eval)):
        for i, source in enumerate(sources):
            try:
                store = preparation.store(source)
                check_bad_rows(store, cfg)
                out = is_held_out(store.hashes, cfg.held_out if section == "train" else 0)
                used = train if section == "train" else evaluation
                used.append(_source(source, store, np.flatnonzero(~out), cfg))
                if out.any():
                    name = HELD_OUT if len(sources) == 1 else f"{HELD_OUT}-{resolve_source(source).name}"
                    share = f"{out.sum():,} of {len(out):,} ({out.mean():.1%}; data.held_out={cfg.held_out:.1%})"
                    kept = _source(source, store, np.flatnonzero(out), cfg, name)
                    held_out.append(replace(kept, held_out=share))
            except DataError as error:
                problems.append(f"data.{section}[{i}]: {error}")
    if cfg.held_out and not held_out and not problems:
        rows = sum(len(source.store) for source in train)
        problems.append(f"data.held_out={cfg.held_out} keeps none of the {rows:,} training rows; raise it")
    if problems:
        raise DataError("\n".join(problems))
    tokens = "".join(f"{source.config.weight}:{source.documents.digest()};" for source in train)
    return LoadedData(train, evaluation + held_out, hashlib.sha256(tokens.encode()).hexdigest())


def is_held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """Return which rows are held out [N] bool: those with a hash in the lowest `share` of all hashes.

    The result for a row depends on that row only: other rows never move it, and equal rows stay together.
    """
    return hashes < np.uint64(min(int(share * 2**64), 2**64 - 1))


def check_bad_rows(store: TokenStore, cfg: DataConfig) -> None:
    """Raise DataError if bad rows are an error, or are too many to skip."""
    bad, rows = store.meta.bad_rows, len(store) + store.meta.bad_rows
    if bad and cfg.on_bad_row == "error":
        problem = "bad rows (set data.on_bad_row=skip to leave them out)"
    elif bad > cfg.max_bad_share * rows:
        allowed = f"data.max_bad_share allows {cfg.max_bad_share:.1%}"
        problem = f"{bad:,} of {rows:,} rows are bad ({bad / rows:.1%}), {allowed}"
    else:
        return
    with store.bad_rows.open(encoding="utf-8") as lines:
        listed = (f"  {row['place']}: {row['reason']}" for row in map(json.loads, lines))
        shown = first_lines(listed, bad, _SHOWN_ERRORS)
    raise DataError("\n".join([f"{problem}, listed in {store.bad_rows}:", *shown]))


def _source(
    source: SourceConfig, store: TokenStore, rows: np.ndarray, cfg: DataConfig, name: str | None = None
) -> Source:
    cut = cut_to_length(store, rows, cfg)
    _check_cut(cut, store, cfg)
    counts = cut.counts + Counter(
        {
            **store.meta.notes,
            "bad rows skipped": store.meta.bad_rows,
            "left without a target": len(cut.without_target),
            "control tokens kept as text": int(store.control_tokens[rows].sum()),
        }
    )
    if not len(cut.documents):
        kind = "held-out row" if name else "row"
        raise DataError(
            f"{source.path} has no usable {kind} ({_describe(counts) or 'it is empty'}); see data.max_length and "
            "data.truncation"
        )
    return Source(name or resolve_source(source).name, source, store, cut.documents, counts)


def _check_cut(cut: Cut, store: TokenStore, cfg: DataConfig) -> None:
    """Raise DataError if rows are too long, or without a target after the cut, and the config makes that an error."""
    if cfg.truncation == "error":
        rows, problem = cut.too_long, f"longer than data.max_length={cfg.max_length}; raise it or set data.truncation"
    elif cfg.on_bad_row == "error" and cfg.truncation != "drop" and len(cut.with_media):
        rows = cut.with_media
        problem = (
            f"longer than data.max_length={cfg.max_length} and hold media, which are never cut; raise it, lower "
            "data.image.max_pixels, or set data.truncation=drop"
        )
    elif cfg.on_bad_row == "error":
        rows = cut.without_target
        problem = f"without a target within {cfg.max_length} tokens; raise data.max_length or set data.truncation"
    else:
        return
    if len(rows):
        listed = (f"  {store.location(row)}: {store.lengths[row]:,} tokens" for row in rows)
        shown = first_lines(listed, len(rows), _SHOWN_ERRORS)
        raise DataError("\n".join([f"{len(rows):,} rows are {problem}:", *shown]))


def first_conversations(source: Source, preparation: Preparation, rows: int) -> list[Conversation]:
    """Return the source's first rows as conversations, read from its files again; of preferences, the good answers.

    Raises: DataError if they are raw text or tokens, or if all answers are bad ones.
    """
    encoder = preparation.encoder(source.config)
    wanted = set(source.store.indices[source.rows].tolist())
    batches = preparation.batches(source.config)
    examples = (example for batch in batches for row, example in encoder.parser.rows(batch) if row.index in wanted)
    parsed = (example for example in examples if not isinstance(example, DataError))
    good = (answer for answer in (_good_answer(example, encoder.objective) for example in parsed) if answer)
    first = list(islice(good, rows))
    if rows and not first:
        raise DataError(
            f"{source.config.path}: every label is false, so no answer is one to compare with; "
            "set generation.num_examples=0"
        )
    chats = [example for example in first if isinstance(example, Conversation)]
    if len(chats) < len(first):
        raise DataError(
            f"{source.config.path}: {source.store.meta.format()} rows have no assistant turn; "
            "set generation.num_examples=0"
        )
    return chats


def _good_answer(example: Example, objective: str) -> Example | None:
    """Return the row, or the chosen side of a pair; None for an answer that its label calls bad."""
    if isinstance(example, Preference):
        return example.chosen
    judged = objective == "kto" and isinstance(example, Conversation)
    return None if judged and not verdict_of(example.verdict) else example


def used_ids(data: LoadedData) -> np.ndarray:
    """Return the distinct token ids [U] int32 of all rows, before any cut."""
    return np.unique(np.concatenate([np.empty(0, np.int32), *(store.used_ids() for store in data.stores)]))


def copy_bad_rows(data: LoadedData, folder: Path) -> Path | None:
    """Write every skipped row to `bad_rows.jsonl` in a run's folder; return None if no row is bad."""
    listed = [store.bad_rows.read_text(encoding="utf-8") for store in data.stores if store.meta.bad_rows]
    if not listed:
        return None
    file = folder / BAD_ROWS
    write_text(file, "".join(listed))
    return file


def _describe(counts: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in counts.items() if count)


def describe_source(source: Source) -> str:
    """Return one line for the console: rows, tokens, targets, and rows left out."""
    tokens, targets = int(source.documents.lengths.sum()), int(source.documents.targets.sum())
    line = (
        f"data: {source.name}: format={source.store.meta.format()}, rows={len(source.rows):,}, tokens={tokens:,}, "
        f"targets={targets:,}" + (f", held out: {source.held_out}" if source.held_out else "")
    )
    return f"{line}; {notes}" if (notes := _describe(source.counts)) else line


def describe_leaks(data: LoadedData) -> list[str]:
    """Return a warning for every evaluation set that contains training rows."""
    trained = np.concatenate([np.empty(0, np.uint64), *(source.store.hashes[source.rows] for source in data.train)])
    shared = [(source, int(np.isin(source.store.hashes[source.rows], trained).sum())) for source in data.eval]
    return [
        f"{source.name}: {count:,} of its {len(source.rows):,} rows are training rows, so its metrics are optimistic"
        for source, count in shared
        if count
    ]
