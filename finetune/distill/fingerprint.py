"""Fingerprint the origin of a cache, to detect a stale or foreign one and name the field that differs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from finetune.config.schema import DistillConfig, ModelConfig
from finetune.data.template.chat import ChatTemplate
from finetune.models.adapters.files import CONFIG_FILE, TENSOR_FILE
from finetune.models.digest import sha256_of, weights_digest
from finetune.models.hub import WEIGHT_FILES, fetch, weight_files
from finetune.system.resources import cache_home

# Increases when the stored columns or the keys of documents change.
SIGNAL_VERSION = 1


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
        weights: of `teacher_weights`.
        adapter: of `teacher_adapter`.
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
    """Return the SHA-256 of each weight file of the teacher. Raises: as `fetch`."""
    source = fetch(teacher.name, teacher.revision, WEIGHT_FILES, "distill.teacher.name", download)
    files = sorted(set(weight_files(source.folder, teacher.name).values()))
    return weights_digest(files, cache_home("quantized") / "digests")


def adapter_folder(name: str, download: bool = True) -> Path:
    """Return the folder of the teacher's adapter, downloaded if needed. Raises: as `fetch`."""
    return fetch(name, None, (CONFIG_FILE, TENSOR_FILE), "distill.teacher.lora", download).folder


def teacher_adapter(name: str | None, download: bool = True) -> dict[str, str]:
    """Return the SHA-256 of each file of the teacher's adapter, empty without one. Raises: as `fetch`."""
    if name is None:
        return {}
    folder = adapter_folder(name, download)
    return {file: sha256_of(folder / file) for file in (CONFIG_FILE, TENSOR_FILE)}
