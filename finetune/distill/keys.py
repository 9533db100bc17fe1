"""What a cached signal is found by: the document it belongs to, wherever that stands in whatever batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from finetune.data.batch import Batch
from finetune.data.documents import Document
from finetune.data.template.chat import UNTRAINED

KEY_BYTES = 16


def document_key(ids: np.ndarray, labels: np.ndarray) -> bytes | None:
    """BLAKE2b of a document's token ids and of which positions carry a target; None for one without a target.

    What follows the last target cannot change what a causal model says there, so it is left out.
    """
    targets = np.flatnonzero(labels != UNTRAINED)
    if not len(targets):
        return None
    end = int(targets[-1]) + 1
    digest = hashlib.blake2b(ids[:end].astype("<i4").tobytes(), digest_size=KEY_BYTES)
    digest.update((labels[:end] != UNTRAINED).tobytes())
    return digest.digest()


def key_of(document: Document) -> bytes | None:
    """The key of a document."""
    return document_key(document.ids, document.labels)


def keys_of(batch: Batch) -> Iterator[tuple[bytes, int]]:
    """(key, targets) of each document of a batch that has a target, in order."""
    ids, labels = batch.input_ids[0].cpu().numpy(), batch.labels[0].cpu().numpy()
    start = 0
    for length in batch.segment_lengths:
        where = slice(start, start := start + length)
        if (key := document_key(ids[where], labels[where])) is not None:
            yield key, int((labels[where] != UNTRAINED).sum())
