"""Load the examples to measure on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.config.schema import RunConfig
from finetune.data.batch import Batch, build_batch, groups_of
from finetune.data.documents import Documents
from finetune.data.loader import load_chat_template, load_data
from finetune.data.tokens.prepare import Preparation, console_progress
from finetune.models.load import load_tokenizer
from finetune.models.tokens import extend_tokenizer
from finetune.system.console import Log

# In smaller batches, reading a layer's weights takes longer than the products with them.
_LEAST_BATCH_TOKENS = 2048


def load_rows(cfg: RunConfig, log: Log) -> tuple[Documents, Documents]:
    """Load the training documents and the held-out documents (possibly none) of a run's config."""
    tokenizer = load_tokenizer(cfg.model)
    extend_tokenizer(tokenizer, cfg.lora.new_tokens)
    chat = load_chat_template(cfg.data, tokenizer)
    # A stream is read to its end: the beginning is not a sample of all its rows.
    whole = cfg.data.model_copy(update={"stream_rows": None})
    data = load_data(Preparation(whole, chat, progress=console_progress(log)))
    held_out = [source.documents for source in data.eval]
    return data.documents, Documents.join(held_out) if held_out else data.documents[:0]


def sample(documents: Documents, rows: int) -> Documents:
    """Select at most `rows` documents, evenly spaced."""
    places = np.linspace(0, len(documents) - 1, min(rows, len(documents)))
    return documents.select(np.unique(places.round().astype(int)))


def batches_of(documents: Documents, max_length: int) -> Sequence[Batch]:
    """Build batches with only the tokens that the documents' targets need."""
    groups = groups_of(documents, max(_LEAST_BATCH_TOKENS, max_length))
    return [build_batch(group, share_prefixes=True) for group in groups]
