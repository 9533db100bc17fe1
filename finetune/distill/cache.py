"""Cache the teacher's targets on disk, one entry per document, and train from them without the teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.config.schema import DistillConfig
from finetune.data.batch import Batch, build_batch, groups_of
from finetune.data.documents import Document
from finetune.distill.codec import LAYOUTS, MOST_IDS, Columns, draw, teacher_samples, teacher_top_k
from finetune.distill.fingerprint import key_of, keys_of
from finetune.distill.shards import ShardReader, check_fingerprint, open_folder
from finetune.losses.chunked import chunked_logits
from finetune.losses.distillation import Teacher, TeacherHidden, TeacherTargets, TeacherTopK
from finetune.system.errors import ConfigError, DataError, IntegrityError

# Tokens per forward pass without a backward pass.
BATCH_TOKENS = 2048
_SHOWN = 5
# How shards hold hidden states of a dtype: numpy has no bfloat16.
_BITS = {torch.bfloat16: "U16", torch.float16: "U16", torch.float32: "F32", torch.float64: "F64"}
# Largest mean difference of log-probabilities, in nats, that counts as rounding. bf16 rounds logits of about 16 by up
# to 0.03, and other kernels round elsewhere.
_SAME_NATS = 0.1

Encode = Callable[[Sequence[Document]], Iterable[Columns]]


def fill_cache(
    folder: Path,
    fingerprint: Mapping[str, Any],
    documents: Sequence[Document],
    encode: Encode,
    *,
    group_tokens: int,
    progress: Callable[[int, int], None],
    flush_seconds: float = 30.0,
) -> int:
    """Write the teacher's targets of all documents that the folder lacks. An interrupted write continues.

    Args:
        encode: returns the columns of each document given; all of them have targets.
        group_tokens: tokens of the documents given to `encode` at once.
        progress: receives (documents done, all documents), at the start and after each document.
        flush_seconds: limit of the work that a killed writer loses.

    Returns:
        The number of documents written now.

    Raises: as `open_folder` and `encode`. Documents encoded before stay in the cache.
    """
    with open_folder(folder, fingerprint) as writer:
        wanted = {key: i for i, document in enumerate(documents) if (key := key_of(document)) is not None}
        lacking = {key: i for key, i in wanted.items() if key not in writer.stored}
        done, flushed = len(wanted) - len(lacking), time.monotonic()
        progress(done, len(wanted))
        keys = iter(lacking)
        for group in groups_of((documents[i] for i in lacking.values()), group_tokens):
            for key, columns in zip(islice(keys, len(group)), encode(group), strict=True):
                writer.add(key, columns)
                if time.monotonic() - flushed > flush_seconds:
                    writer.flush()
                    flushed = time.monotonic()
                progress(done := done + 1, len(wanted))
        writer.finish()
    return len(lacking)


def build_encoder(teacher: Teacher, cfg: DistillConfig, vocabulary: int) -> Encode:
    """Build the `encode` of `fill_cache` for a teacher with hidden states, by `distill.cache_kind`."""
    if cfg.cache_kind == "sampled" and vocabulary > MOST_IDS:
        raise ConfigError(
            f"distill.cache_kind: sampled stores at most {MOST_IDS:,} ids, found {vocabulary:,}\nhelp: set hidden"
        )

    def encode(documents: Sequence[Document]) -> Iterator[Columns]:
        batches = [build_batch(group, share_prefixes=True) for group in groups_of(documents, BATCH_TOKENS)]
        for batch, targets in zip(batches, teacher.targets_for(batches), strict=True):
            assert isinstance(targets, TeacherHidden)
            keys = list(keys_of(batch))
            if cfg.cache_kind == "hidden":
                hidden_ND = targets.hidden_ND.contiguous()
                # numpy has no bfloat16: 16-bit values are stored as their bits.
                bits = hidden_ND.view(torch.uint16) if hidden_ND.dtype.itemsize == 2 else hidden_ND
                columns = {"hidden": bits.cpu().numpy()}
            else:
                # Draws depend on the document and the seed alone, not on the batch.
                rngs = ((np.random.default_rng([cfg.seed, int.from_bytes(key)]), count) for key, count in keys)
                uniforms = [rng.random((count, cfg.num_samples)) for rng, count in rngs]
                uniforms_NS = np.concatenate([np.empty((0, cfg.num_samples)), *uniforms])
                columns = draw(targets, vocabulary, cfg.top_k, uniforms_NS)
            start = 0
            for _, count in keys:
                yield {name: column[start : start + count] for name, column in columns.items()}
                start += count

    return encode


class CachedTeacher:
    """A teacher that reads a complete cache."""

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        device: torch.device,
        *,
        head: nn.Module | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        """Open a cache.

        Args:
            head: maps hidden states to logits; needed for cache_kind=hidden.
            dtype: of the hidden states.

        Raises:
            ConfigError: the cache is incomplete, or of other settings; the message names the fields that differ.
            IntegrityError: names a corrupt shard.
        """
        check_fingerprint(folder, fingerprint)
        self.folder, self.device, self._head, self._dtype = folder, device, head, dtype
        self.kind: str = fingerprint["kept"]["cache_kind"]
        self._reader = ShardReader(folder)
        self._reader.check_layout(LAYOUTS.get(self.kind, {"hidden": (_BITS[dtype], 2)}))

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherTargets]:
        """Yield the targets of each batch, whose documents `check_holds` has found."""
        for batch in batches:
            columns = self._reader.read([key for key, _ in keys_of(batch)])
            if self.kind == "hidden":
                assert self._head is not None
                hidden_ND = torch.from_numpy(columns["hidden"]).view(self._dtype).to(self.device)
                yield TeacherHidden(hidden_ND, self._head)
            else:
                decode = teacher_samples if self.kind == "sampled" else teacher_top_k
                yield decode(columns, self.device)

    def check_holds(self, documents: Iterable[Document]) -> None:
        """Raises: DataError with the number of missing documents and the locations of the first ones."""
        keyed = [(key, document.location) for document in documents if (key := key_of(document)) is not None]
        missing = self._reader.missing([key for key, _ in keyed])
        if len(missing):
            shown = ", ".join(keyed[i][1] for i in missing[:_SHOWN])
            raise DataError(
                f"distill.cache: {self.folder} lacks {len(missing):,} of {len(keyed):,} documents (other rows, "
                f"template, data.max_length or data.train_on), first {shown}\n"
                "help: run finetune cache with this config; it adds them"
            )

    def check_against(self, teacher: Teacher, documents: Sequence[Document], vocabulary: int) -> float:
        """Compare the cache with its teacher on some documents.

        Returns:
            The mean difference of log-probabilities over the stored tokens, in nats.
        """
        batch = build_batch(documents)
        [mine], [theirs] = self.targets_for([batch]), teacher.targets_for([batch])
        assert isinstance(theirs, TeacherHidden)
        difference = _difference(mine, theirs, vocabulary)
        if not difference <= _SAME_NATS:
            raise IntegrityError(
                f"distill.cache: {self.folder} differs from the teacher by {difference:.3g} nats on average over "
                f"{', '.join(batch.locations)}, which exceeds rounding\n"
                "help: write it again into a new folder"
            )
        return difference


def _difference(mine: TeacherTargets, theirs: TeacherHidden, vocabulary: int) -> float:
    """Return the mean difference of log-probabilities per target, weighted by the cached probabilities, in nats."""
    total = 0.0
    cached = chunked_logits(mine.hidden_ND, mine.head, vocabulary) if isinstance(mine, TeacherHidden) else iter(())
    for logits_NV, rows in chunked_logits(theirs.hidden_ND, theirs.head, vocabulary):
        log_probs = torch.log_softmax(logits_NV.float(), -1)
        if isinstance(mine, TeacherHidden):
            mine_log_probs = torch.log_softmax(next(cached)[0].float(), -1)
        elif isinstance(mine, TeacherTopK):
            mine_log_probs, log_probs = mine.log_probs_NK[rows], log_probs.gather(1, mine.ids_NK[rows])
        else:  # drawn tokens are not stored with their own probability
            mine_log_probs = mine.probs_NK[rows, : mine.top_k].log()
            log_probs = log_probs.gather(1, mine.ids_NK[rows, : mine.top_k])
        total += ((mine_log_probs - log_probs).abs() * mine_log_probs.exp()).sum().item()
    return total / max(1, len(theirs.hidden_ND))
