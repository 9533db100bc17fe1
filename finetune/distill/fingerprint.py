"""Where a cached signal comes from: everything that decides it, so that a stale or foreign one is told by a field."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from finetune.config.schema import DistillConfig, ModelConfig
from finetune.data.template.chat import ChatTemplate
from finetune.models.adapters.files import CONFIG_FILE, TENSOR_FILE
from finetune.models.digest import sha256_of, weights_digest
from finetune.models.hub import WEIGHT_FILES, fetch, weight_files
from finetune.system.cache_home import cache_home

# Raised when what is kept of a distribution, or how a document's key is made, changes.
SIGNAL_VERSION = 1


def fingerprint(
    cfg: DistillConfig,
    teacher: ModelConfig,
    chat: ChatTemplate,
    vocabulary: int,
    weights: dict[str, str] | None,
    adapter: dict[str, str] | None,
) -> dict[str, Any]:
    """What a folder of signals must have been made from; None where it cannot be known here.

    weights, adapter: of `teacher_weights` and `teacher_adapter`. vocabulary: ids that take part.
    """
    server = cfg.teacher.placement == "server"
    kept: dict[str, Any] = {"cache_kind": "top" if server else cfg.cache_kind}
    if server:
        kept |= {"top_k": cfg.top_k}
    elif cfg.cache_kind == "sampled":
        kept |= {"top_k": cfg.top_k, "num_samples": cfg.num_samples, "seed": cfg.seed}
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
    """SHA-256 of each of the teacher's weight files. Raises: as `fetch`, where they are not to be had."""
    source = fetch(teacher.name, teacher.revision, WEIGHT_FILES, "distill.teacher.name", download)
    files = sorted(set(weight_files(source.folder, teacher.name).values()))
    return weights_digest(files, cache_home("quantized") / "digests")


def adapter_folder(name: str, download: bool = True) -> Path:
    """The folder of the teacher's own adapter, a local one or the hub's. Raises: as `fetch`."""
    return fetch(name, None, (CONFIG_FILE, TENSOR_FILE), "distill.teacher.lora", download).folder


def teacher_adapter(name: str | None, download: bool = True) -> dict[str, str]:
    """SHA-256 of each file of the teacher's own adapter; none for a teacher without one. Raises: as `fetch`."""
    if name is None:
        return {}
    folder = adapter_folder(name, download)
    return {file: sha256_of(folder / file) for file in (CONFIG_FILE, TENSOR_FILE)}
