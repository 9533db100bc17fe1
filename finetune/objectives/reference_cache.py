"""Log-probabilities of answers under the reference policy: one file, for any order and packing of rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.config.schema import RunConfig
from finetune.data.batch import Batch, build_batch, groups_of
from finetune.data.documents import Document
from finetune.data.loader import load_media_processor
from finetune.data.template.chat import ChatTemplate
from finetune.distill.fingerprint import KEY_BYTES, key_of, keys_of
from finetune.evaluation.scoring import evaluating
from finetune.losses.preference import answer_log_probs
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.folder import CONFIG_FILE, TENSOR_FILE
from finetune.models.digest import weights_digest
from finetune.models.fused import fuse_layers
from finetune.models.hub import WEIGHT_FILES, fetch, weight_files
from finetune.models.load import load_base
from finetune.objectives.policies import base_policy
from finetune.ops.limits import EVALUATION_TOKENS
from finetune.system.atomic import replaced_file
from finetune.system.console import Log
from finetune.system.errors import ConfigError, DataError, FinetuneError, IntegrityError, os_errors_as
from finetune.system.manifest import sha256_of
from finetune.system.resources import cache_home
from finetune.towers.towers import build_towers

FILE = "log_probs.npz"
# Raise it when the stored columns or the keys of documents change.
_VERSION = 1
_FULL = "free space and run finetune cache again; it continues"
_SHOWN = 5
_SECONDS_BETWEEN_WRITES = 60.0
_SECONDS_BETWEEN_LINES = 10.0
# Documents -> the summed log-probability of the targets of each.
Score = Callable[[Sequence[Document]], Iterator[float]]


def write_reference_cache(
    cfg: RunConfig, chat: ChatTemplate, answers: Sequence[Document], device: torch.device, log: Log
) -> int:
    """Write the log-probabilities that `preference.cache` lacks; return how many. Without any, no model is loaded."""
    folder = reference_folder(cfg)
    cache = ReferenceCache(folder, reference_origin(cfg, chat))
    last = time.monotonic()

    def score(documents: Sequence[Document]) -> Iterator[float]:
        if not documents:
            return
        base = load_base(cfg.model, cfg.quant, device, log)
        # Without an adapter to continue from, a new one changes nothing.
        model = attach_lora(base, cfg.lora)
        fuse_layers(model)
        build_towers(base, cfg.model, load_media_processor(cfg.model, cfg.data))
        with torch.no_grad(), evaluating(model):
            for group in groups_of(documents, max(EVALUATION_TOKENS, cfg.data.max_length)):
                with base_policy(model)() if reference_adapter(cfg) is None else nullcontext():
                    yield from answer_log_probs(model, build_batch(group, share_prefixes=True))[0].tolist()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log(f"reference: {done:,} of {total:,} answers")

    return cache.fill(answers, score, progress)


def reference_folder(cfg: RunConfig) -> Path:
    """Return the folder of `preference.cache`. Raises: ConfigError without one."""
    if cfg.preference.cache is None:
        raise ConfigError("preference.cache: missing\nhelp: set the folder of the cache")
    return Path(cfg.preference.cache).expanduser()


def reference_origin(cfg: RunConfig, chat: ChatTemplate) -> dict[str, Any]:
    """Return what decides the reference's log-probabilities: weights, their storage, adapter, tokenizer, template."""
    base = fetch(cfg.model.name, cfg.model.revision, WEIGHT_FILES, "model.name").folder
    files = sorted(set(weight_files(base, cfg.model.name).values()))
    adapter = {}
    if (name := reference_adapter(cfg)) is not None:
        folder = fetch(name, None, (CONFIG_FILE, TENSOR_FILE), "lora.init_adapter").folder
        adapter = {file: sha256_of(folder / file) for file in (CONFIG_FILE, TENSOR_FILE)}
    return {
        "version": _VERSION,
        "weights": weights_digest(files, cache_home("quantized") / "digests"),
        "dtype": cfg.model.dtype,
        "quant": cfg.quant.model_dump(exclude={"cache", "keep_dequantized"}),
        "adapter": adapter,
        "tokenizer": chat.digest(),
        "template": hashlib.sha256(chat.template.encode()).hexdigest(),
    }


def reference_adapter(cfg: RunConfig) -> str | None:
    """Return the adapter of the reference policy; None if it is the base."""
    return None if cfg.preference.reference == "base" else cfg.lora.init_adapter


class ReferenceCache:
    """Log-probabilities by document.

    Raises:
        ConfigError: the folder holds those of another policy.
        IntegrityError: its file cannot be read.
    """

    def __init__(self, folder: Path, origin: dict[str, Any]):
        self.file, self.origin = folder / FILE, origin
        self._log_probs: dict[bytes, float] = {}
        if not self.file.exists():
            return
        try:
            with np.load(self.file, allow_pickle=False) as stored:
                keys, log_probs = stored["keys"], stored["log_probs"]
                found = json.loads(str(stored["origin"]))
        except Exception as error:
            raise IntegrityError(
                f"{self.file}: corrupt ({error or type(error).__name__})\nhelp: remove it and run finetune cache again"
            ) from error
        if different := [name for name in origin if found.get(name) != origin[name]]:
            raise ConfigError(
                f"preference.cache={folder}: was written by another policy; different: {', '.join(different)}\n"
                "help: name another folder, or set what wrote it"
            )
        self._log_probs = {bytes(key): float(value) for key, value in zip(keys, log_probs, strict=True)}

    def missing(self, documents: Sequence[Document]) -> list[Document]:
        """Return the documents without a log-probability, each once."""
        lacking = {key: document for document in documents if (key := key_of(document)) not in self._log_probs}
        return [document for key, document in lacking.items() if key is not None]

    def fill(self, documents: Sequence[Document], score: Score, progress: Callable[[int, int], None]) -> int:
        """Compute and store what is missing; an interrupted call loses at most a minute's work. Return how many."""
        missing, written = self.missing(documents), time.monotonic()
        for done, (document, log_prob) in enumerate(zip(missing, score(missing), strict=True), 1):
            self._log_probs[key_of(document) or b""] = log_prob
            progress(done, len(missing))
            if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                self._write()
                written = time.monotonic()
        self._write()
        return len(missing)

    def check_holds(self, documents: Sequence[Document]) -> None:
        """Raise DataError naming documents that are not in the cache."""
        if missing := self.missing(documents):
            places = sorted({document.location for document in missing})
            more = f" and {len(places) - _SHOWN:,} more" if len(places) > _SHOWN else ""
            raise DataError(
                f"preference.cache: {self.file.parent} lacks {len(missing):,} answers of the rows "
                f"{', '.join(places[:_SHOWN])}{more}\nhelp: run finetune cache with the same config; it adds them"
            )

    def log_probs(self, batch: Batch) -> Tensor:
        """Return the log-probability of each document of a batch [A], fp32 on the CPU."""
        return torch.tensor([self._log_probs[key] for key, _ in keys_of(batch)], dtype=torch.float32)

    def _write(self) -> None:
        keys = np.frombuffer(b"".join(self._log_probs), dtype=np.uint8).reshape(-1, KEY_BYTES)
        log_probs = np.fromiter(self._log_probs.values(), dtype=np.float64, count=len(self._log_probs))
        with os_errors_as(FinetuneError, f"preference.cache: {self.file}: cannot be written", _FULL):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(self.file) as stream:
                np.savez(stream, keys=keys, log_probs=log_probs, origin=np.array(json.dumps(self.origin)))
