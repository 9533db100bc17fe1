"""Identify the content of a cache: its origin, so that a foreign one is refused, and the key of each document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config.schema import DistillConfig, ModelConfig
from finetune.data.batch import Batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.template.chat import ChatTemplate
from finetune.models.adapters.folder import CONFIG_FILE, TENSOR_FILE
from finetune.models.digest import weights_digest
from finetune.models.hub import WEIGHT_FILES, fetch, weight_files
from finetune.system.manifest import sha256_of
from finetune.system.resources import cache_home

# Increases when the stored columns or the keys of documents change.
SIGNAL_VERSION = 1
KEY_BYTES = 16


def fingerprint(
    cfg: DistillConfig,
    teacher: ModelConfig,
    chat: ChatTemplate,
    vocabulary: int,
    *,
    weights: dict[str, str] | None,
    adapter: dict[str, str] | None,
) -> dict[str, Any]:
    """Return the fields that decide the content of a cache; None for a field that is unknown here.

    Args:
        vocabulary: ids below it take part in the divergence.
        weights, adapter: of `teacher_weights` and `teacher_adapter`.
    """
    server = cfg.teacher.placement == "server"
    kept: dict[str, Any] = {"cache_kind": "top" if server else cfg.cache_kind}
    if kept["cache_kind"] != "hidden":
        kept["top_k"] = cfg.top_k
    if kept["cache_kind"] == "sampled":
        kept |= {"num_samples": cfg.num_samples, "seed": cfg.seed}
    return {
        "version": SIGNAL_VERSION,
        "kept": kept,
        "vocabulary": vocabulary,
        "served": (cfg.teacher.served_as or cfg.teacher.name) if server else "nowhere",
        "weights": None if server else weights,
        "adapter": None if server else adapter,
        "dtype": None if server else teacher.dtype,
        "tokenizer": chat.digest(),
        "template": hashlib.sha256(chat.template.encode()).hexdigest(),
    }


def teacher_weights(teacher: ModelConfig, download: bool = True) -> dict[str, str]:
    """Return the SHA-256 of each weight file of the teacher. Raises: as `fetch`."""
    source = fetch(teacher.name, teacher.revision, WEIGHT_FILES, "distill.teacher.name", download)
    files = sorted(set(weight_files(source.folder, teacher.name).values()))
    return weights_digest(files, cache_home("quantized") / "digests")


def adapter_folder(name: str | None, download: bool = True) -> Path | None:
    """Return the folder of the teacher's adapter, downloaded if needed; None without one. Raises: as `fetch`."""
    if name is None:
        return None
    return fetch(name, None, (CONFIG_FILE, TENSOR_FILE), "distill.teacher.lora", download).folder


def teacher_adapter(name: str | None, download: bool = True) -> dict[str, str]:
    """Return the SHA-256 of each file of the teacher's adapter, empty without one. Raises: as `fetch`."""
    folder = adapter_folder(name, download)
    return {} if folder is None else {file: sha256_of(folder / file) for file in (CONFIG_FILE, TENSOR_FILE)}


def key_of(document: Document) -> bytes | None:
    """Return the BLAKE2b hash of a document's token ids, target positions and media; None for one without a target.

    Tokens after the last target are left out: a causal model does not see them.
    """
    return _key(document.ids, document.labels != IGNORE_INDEX, document.media_digest)


def keys_of(batch: Batch) -> Iterator[tuple[bytes, int]]:
    """Yield (key, number of targets) of each document of a batch with a target, in order.

    A document has the same key in any batch.
    """
    ids, has_target = batch.input_ids[0].cpu().numpy(), (batch.labels[0] != IGNORE_INDEX).cpu().numpy()
    start = 0
    for length, media_digest in zip(batch.segment_lengths, batch.media_digests, strict=True):
        where = slice(start, start := start + length)
        if (key := _key(ids[where], has_target[where], media_digest)) is not None:
            yield key, int(has_target[where].sum())


def _key(ids: np.ndarray, has_target: np.ndarray, media_digest: bytes) -> bytes | None:
    targets = np.flatnonzero(has_target)
    if not len(targets):
        return None
    end = int(targets[-1]) + 1
    digest = hashlib.blake2b(ids[:end].astype("<i4").tobytes(), digest_size=KEY_BYTES)
    digest.update(has_target[:end].tobytes())
    digest.update(media_digest)
    return digest.digest()
