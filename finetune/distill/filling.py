"""Write a cache of the teacher's targets from a resident, streamed or served teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from finetune.config.schema import RunConfig
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.template.chat import ChatTemplate
from finetune.distill.cache import BATCH_TOKENS, Encode, build_encoder, fill_cache
from finetune.distill.codec import Columns, encode_top
from finetune.distill.fingerprint import adapter_folder
from finetune.distill.resident import load_resident
from finetune.distill.server import LogprobServer
from finetune.distill.teacher import cache_fingerprint, cache_path, streamed_teacher, teacher_model
from finetune.models.hub import WEIGHT_FILES, fetch, weight_files
from finetune.models.quant.bit_widths import DTYPE_BYTES
from finetune.system.accelerator import free_bytes_of
from finetune.system.console import Log, Pace
from finetune.system.format import format_duration

# Tokens per pass of a streamed teacher: there a GPU computes as long as a fast disk reads. At 7B they are 1.1 GB of
# hidden states.
_PASS_TOKENS, _CPU_PASS_TOKENS = 131_072, 16_384
# Share of the free memory that a teacher may take.
_FREE_SHARE = 0.6


def write_cache(
    cfg: RunConfig,
    chat: ChatTemplate,
    vocabulary: int,
    documents: Sequence[Document],
    *,
    device: torch.device,
    log: Log,
) -> int:
    """Write the documents that `distill.cache` lacks, with the teacher in the config.

    With placement=cached, the teacher is resident if it fits into memory, else streamed. If the cache lacks nothing,
    no teacher is loaded.

    Returns:
        The number of documents written now.

    Raises: as `fill_cache` and the teacher.
    """

    @cache
    def teacher() -> Encode:
        if placement == "server":
            return _server_encoder(cfg, vocabulary, log)
        if placement == "streamed":
            return build_encoder(streamed_teacher(cfg, device, log), cfg.distill, vocabulary)
        resident = load_resident(teacher_model(cfg), adapter_folder(cfg.distill.teacher.lora), device)
        return build_encoder(resident, cfg.distill, vocabulary)

    placement = cfg.distill.teacher.placement
    if placement == "cached":
        placement = "resident" if _fits(cfg, device) else "streamed"
    streamed_tokens = _CPU_PASS_TOKENS if device.type == "cpu" else _PASS_TOKENS
    return fill_cache(
        cache_path(cfg),
        cache_fingerprint(cfg, chat, vocabulary, log),
        documents,
        lambda some: teacher()(some),
        group_tokens=streamed_tokens if placement == "streamed" else 8 * BATCH_TOKENS,
        progress=_log_progress(placement, log),
    )


def _fits(cfg: RunConfig, device: torch.device) -> bool:
    """Return whether the teacher's weights fit into free memory, with room for a forward pass."""
    model = teacher_model(cfg)
    folder = fetch(model.name, model.revision, WEIGHT_FILES, "distill.teacher.name").folder
    files = set(weight_files(folder, model.name).values())
    # The files hold 16-bit weights, as all of Qwen2.5 do.
    size = sum(file.stat().st_size for file in files) * DTYPE_BYTES[model.dtype] / 2
    free = free_bytes_of(device)
    return size < _FREE_SHARE * free


def _server_encoder(cfg: RunConfig, vocabulary: int, log: Log) -> Encode:
    teacher = cfg.distill.teacher
    assert teacher.url is not None
    server = LogprobServer(teacher.url, teacher.served_as or teacher.name, cfg.distill.top_k, log=log)
    server.check()

    def encode(documents: Sequence[Document]) -> Iterator[Columns]:
        requests = []
        for document in documents:
            positions = np.flatnonzero(document.labels != IGNORE_INDEX)
            requests.append((document.ids[: positions[-1] + 2], positions))
        for answer in server.score_many(requests, teacher.requests):
            yield encode_top(*_known(*answer, vocabulary))

    return encode


def _known(ids_NK: np.ndarray, log_probs_NK: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Replace ids beyond the vocabulary (padding rows of the table) by other improbable ids, each once per row."""
    ids_NK, log_probs_NK = ids_NK.copy(), log_probs_NK.copy()
    for row in np.flatnonzero((ids_NK >= vocabulary).any(1)):
        spare = ids_NK[row] >= vocabulary
        others = np.setdiff1d(np.arange(min(vocabulary, 2 * ids_NK.shape[1])), ids_NK[row])
        ids_NK[row, spare] = others[: spare.sum()]
        log_probs_NK[row, spare] = -np.inf
    return ids_NK, log_probs_NK


def _log_progress(placement: str, log: Log) -> Callable[[int, int], None]:
    began, first, pace = 0.0, -1, Pace()

    def progress(done: int, total: int) -> None:
        nonlocal began, first
        if first < 0:
            began, first = time.monotonic(), done
            if done < total:
                log(f"cache: teacher={placement}, to_write={total - done:,} of {total:,} documents")
        elif done < total and pace.is_due():
            left = (total - done) * (time.monotonic() - began) / (done - first)
            log(f"cache: {done:,} of {total:,} documents, {format_duration(left)} left")

    return progress


def size_of(folder: Path) -> int:
    """Return the bytes of a cache's shards."""
    return sum(file.stat().st_size for file in folder.glob("shard-*.safetensors"))
