"""A cache of embeddings on disk: the next epoch, and the next run, read them instead of running the towers.

    $FINETUNE_CACHE/media/embeddings/<fingerprint>/<two digits>/<digest of the file and its settings>.safetensors

The fingerprint covers all else that decides the bits: weights, dtype and device type of the base, and versions of
libraries. A file appears by one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.config.schema import ModelConfig
from finetune.data.media.media import Media
from finetune.models.digest import weights_digest
from finetune.models.hub import WEIGHT_FILES, fetch, weight_files
from finetune.models.safetensors_index import save_tensors
from finetune.system.console import log_once
from finetune.system.errors import FinetuneError, os_errors_as
from finetune.system.resources import cache_home

# Raise it when the same towers and media give other embeddings, or files are stored otherwise (2: with their SHA-256).
_VERSION = 2
_KEY, _SUM = "embeddings", "sha256"


@dataclass(frozen=True)
class EmbeddingCache:
    """Embeddings of media by one base's towers."""

    folder: Path

    def find(self, media: Media) -> Tensor | None:
        """Return the embeddings [tokens, D] of a file, mapped; None if missing or, with a log line, corrupt."""
        file = self._file(media)
        try:
            with safe_open(file, framework="pt") as stored:
                found, then = stored.get_tensor(_KEY), (stored.metadata() or {}).get(_SUM)
            if len(found) != media.tokens or then != _sum_of(found):
                raise ValueError("its SHA-256 differs")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            log_once(f"data.media_cache: {file} is corrupt ({error}); computing it again")
            return None
        return found

    def write(self, media: Media, embeddings: Tensor) -> None:
        """Keep the embeddings [tokens, D] of a file. Raises: FinetuneError, as ResourceError if the disk is full."""
        file = self._file(media)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        problem, advice = f"data.media_cache: cannot write {file}", "free space, or set FINETUNE_CACHE to another disk"
        try:
            with os_errors_as(FinetuneError, problem, f"{advice}, or data.media_cache=false"):
                file.parent.mkdir(parents=True, exist_ok=True)
                stored = embeddings.cpu().contiguous()
                save_tensors({_KEY: stored}, temporary, metadata={_SUM: _sum_of(stored)})
                os.replace(temporary, file)
        except FinetuneError:
            with suppress(OSError):
                temporary.unlink()
            raise

    def missing(self, media: Iterable[Media]) -> list[Media]:
        """Return the distinct files whose embeddings are not there, in their order."""
        distinct = {each.digest: each for each in media}
        return [each for each in distinct.values() if not self._file(each).is_file()]

    def _file(self, media: Media) -> Path:
        name = media.digest.hex()
        return self.folder / name[:2] / f"{name}.safetensors"


def _sum_of(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_cache(model: ModelConfig, device: torch.device) -> EmbeddingCache:
    """Return the cache of a base's frozen towers."""
    folder = fetch(model.name, model.revision, WEIGHT_FILES, "model.name").folder
    files = sorted(set(weight_files(folder, model.name).values()))
    made_from: dict[str, Any] = {
        "version": _VERSION,
        "weights": weights_digest(files, cache_home("quantized") / "digests"),
        "dtype": model.dtype,
        # Kernels of other devices or versions may round differently.
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
    return EmbeddingCache(cache_home("media") / "embeddings" / name)
