"""Keys of cached targets: a document has the same key in any batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from finetune.data.batch import Batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX

KEY_BYTES = 16


def document_key(ids: np.ndarray, labels: np.ndarray, media_digest: bytes = b"") -> bytes | None:
    """Return the BLAKE2b hash of a document's token ids, target positions and media; None for one without a target.

    Tokens after the last target are left out: a causal model does not see them.
    """
    targets = np.flatnonzero(labels != IGNORE_INDEX)
    if not len(targets):
        return None
    end = int(targets[-1]) + 1
    digest = hashlib.blake2b(ids[:end].astype("<i4").tobytes(), digest_size=KEY_BYTES)
    digest.update((labels[:end] != IGNORE_INDEX).tobytes())
    digest.update(media_digest)
    return digest.digest()


def key_of(document: Document) -> bytes | None:
    """Return the key of a document."""
    return document_key(document.ids, document.labels, document.media_digest)


def keys_of(batch: Batch) -> Iterator[tuple[bytes, int]]:
    """Yield (key, number of targets) of each document of a batch with a target, in order."""
    ids, labels = batch.input_ids[0].cpu().numpy(), batch.labels[0].cpu().numpy()
    start = 0
    for length, media_digest in zip(batch.segment_lengths, batch.media_digests, strict=True):
        where = slice(start, start := start + length)
        if (key := document_key(ids[where], labels[where], media_digest)) is not None:
            yield key, int((labels[where] != IGNORE_INDEX).sum())
