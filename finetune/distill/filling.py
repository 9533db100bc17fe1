"""Writing a folder of signals: who is asked, how many documents at a time, and how far it is."""

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
from finetune.distill.cache import BATCH_TOKENS, Encode, encoder_of, fill_cache
from finetune.distill.codec import Columns, encode_top
from finetune.distill.fingerprint import adapter_folder
from finetune.distill.resident import load_resident
from finetune.distill.server import LogprobServer
from finetune.distill.teacher import cache_of, signal_fingerprint, streamed_teacher, teacher_model
from finetune.models.hub import WEIGHT_FILES, fetch, weight_files
from finetune.models.quant.bit_widths import DTYPE_BYTES
from finetune.system.console import Log
from finetune.system.machine import available_memory

# Tokens that a streamed teacher answers each time it is read: where a GPU computes as long as a fast disk reads
# (operations a second over bytes a second), and 1.1 GB of states at 7B.
_PASS_TOKENS = {"cuda": 131_072, "cpu": 16_384}
# Of the free memory, what a teacher may take.
_FITS = 0.6
_WHOM = {"resident": "the teacher", "streamed": "the teacher, layer by layer,", "server": "the server"}


def write_cache(
    cfg: RunConfig, chat: ChatTemplate, vocabulary: int, documents: Sequence[Document], device: torch.device, log: Log
) -> int:
    """Write what `distill.cache` lacks of these documents, through the teacher that the config names.

    placement=cached takes the teacher into memory where it fits, and reads it layer by layer where not. Where nothing
    is lacking, no teacher is loaded.
    Returns: documents written now.
    Raises: as `fill_cache`, and as the teacher does.
    """

    @cache
    def teacher() -> Encode:
        """Loaded for the first document that is lacking."""
        if placement == "server":
            return _ask_server(cfg, vocabulary, log)
        if placement == "streamed":
            return encoder_of(streamed_teacher(cfg, device, log), cfg.distill, vocabulary)
        lora = cfg.distill.teacher.lora
        resident = load_resident(teacher_model(cfg), None if lora is None else adapter_folder(lora), device)
        return encoder_of(resident, cfg.distill, vocabulary)

    placement = cfg.distill.teacher.placement
    if placement == "cached":
        placement = "resident" if _fits(cfg, device) else "streamed"
    group_tokens = _PASS_TOKENS.get(device.type, _PASS_TOKENS["cuda"]) if placement == "streamed" else 8 * BATCH_TOKENS
    origin = signal_fingerprint(cfg, chat, vocabulary, log)
    progress = _progress(_WHOM[placement], log)
    return fill_cache(cache_of(cfg), origin, documents, lambda some: teacher()(some), group_tokens, progress)


def _fits(cfg: RunConfig, device: torch.device) -> bool:
    """Whether the teacher's weights fit into what is free, with room for a forward pass."""
    model = teacher_model(cfg)
    folder = fetch(model.name, model.revision, WEIGHT_FILES, "distill.teacher.name").folder
    files = set(weight_files(folder, model.name).values())
    # Files of 16-bit weights, as all of Qwen2.5's are.
    size = sum(file.stat().st_size for file in files) * DTYPE_BYTES[model.dtype] / 2
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return free is None or size < _FITS * free


def _ask_server(cfg: RunConfig, vocabulary: int, log: Log) -> Encode:
    teacher = cfg.distill.teacher
    assert teacher.url is not None
    server = LogprobServer(teacher.url, teacher.served_as or teacher.name, cfg.distill.top_k, log=log)
    server.check()

    def encode(documents: Sequence[Document]) -> Iterator[Columns]:
        asked = []
        for document in documents:
            positions = np.flatnonzero(document.labels != IGNORE_INDEX)
            asked.append((document.ids[: positions[-1] + 2], positions))
        for answer in server.score_many(asked, teacher.requests):
            yield encode_top(*_known(answer.ids, answer.log_probs, vocabulary))

    return encode


def _known(ids_NK: np.ndarray, log_probs_NK: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens without rows beyond the vocabulary, which a large table has to spare: others that are as improbable
    take their places, so that a row names as many tokens, each once.
    """
    ids_NK, log_probs_NK = ids_NK.copy(), log_probs_NK.copy()
    for row in np.flatnonzero((ids_NK >= vocabulary).any(1)):
        spare = ids_NK[row] >= vocabulary
        others = np.setdiff1d(np.arange(min(vocabulary, 2 * ids_NK.shape[1])), ids_NK[row])
        ids_NK[row, spare] = others[: spare.sum()]
        log_probs_NK[row, spare] = -np.inf
    return ids_NK, log_probs_NK


def _progress(whom: str, log: Log, every_seconds: float = 10.0) -> Callable[[int, int], None]:
    began: float | None = None
    first, last = 0, 0.0

    def tell(done: int, total: int) -> None:
        nonlocal began, first, last
        now = time.monotonic()
        if began is None:
            began, first, last = now, done, now
            if done < total:
                log(f"asking {whom} about {total - done:,} of {total:,} documents")
        elif now - last >= every_seconds and done < total:
            last = now
            left = (total - done) * (now - began) / (done - first)
            log(f"{done:,} of {total:,} documents, {int(left // 60)}:{int(left % 60):02d} left")

    return tell


def size_of(folder: Path) -> int:
    """Bytes of a folder's shards."""
    return sum(file.stat().st_size for file in folder.glob("shard-*.safetensors"))
