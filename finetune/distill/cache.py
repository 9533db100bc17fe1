"""The teacher's signal on disk: written once for every document, then trained from without the teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.config.schema import DistillConfig
from finetune.data.batch import Batch, build_batch, groups_of
from finetune.data.documents import Document
from finetune.distill.codec import MOST_IDS, Columns, draw, teacher_samples, teacher_top_k
from finetune.distill.keys import key_of, keys_of
from finetune.distill.shards import ShardReader, check_fingerprint, open_folder
from finetune.losses.chunked import chunked_logits
from finetune.losses.teacher_targets import Teacher, TeacherHidden, TeacherSamples, TeacherTargets, TeacherTopK
from finetune.system.errors import ConfigError, DataError, IntegrityError

# Tokens of a forward pass, in which nothing is kept for a backward pass.
BATCH_TOKENS = 2048
_SHOWN = 5
# Mean difference of log-probabilities between a cache and its teacher up to which it is taken for rounding, in nats:
# bf16 logits of about 16 are rounded by up to 0.03, and other kernels round elsewhere.
_SAME_NATS = 0.1

Encode = Callable[[Sequence[Document]], Iterable[Columns]]


def fill_cache(
    folder: Path,
    fingerprint: Mapping[str, Any],
    documents: Sequence[Document],
    encode: Encode,
    group_tokens: int,
    log: Callable[[int, int], None],
    flush_seconds: float = 30.0,
) -> int:
    """Write the signals of all documents that the folder lacks; one that was killed goes on where it stopped.

    encode: the columns of each of some documents, which all have targets; it gets as many as have `group_tokens`.
    say: told how many documents are done, and of how many, at the start and after each.
    flush_seconds: what a killed writer loses at most.
    Returns: documents written now.
    Raises: as `open_folder`, and as `encode`; what was answered until then is kept.
    """
    with open_folder(folder, fingerprint) as writer:
        wanted = {key: i for i, document in enumerate(documents) if (key := key_of(document)) is not None}
        lacking = {key: i for key, i in wanted.items() if key not in writer.stored}
        done, flushed = len(wanted) - len(lacking), time.monotonic()
        log(done, len(wanted))
        keys = iter(lacking)
        for group in groups_of((documents[i] for i in lacking.values()), group_tokens):
            for key, columns in zip(islice(keys, len(group)), encode(group), strict=True):
                writer.add(key, columns)
                if time.monotonic() - flushed > flush_seconds:
                    writer.flush()
                    flushed = time.monotonic()
                log(done := done + 1, len(wanted))
        writer.finish()
    return len(lacking)


def encoder_of(teacher: Teacher, cfg: DistillConfig, vocabulary: int) -> Encode:
    """What `fill_cache` keeps of a teacher that knows everything, as `distill.cache_kind` says.

    Raises: ConfigError if the vocabulary has more ids than a sampled cache can tell apart.
    """
    if cfg.cache_kind == "sampled" and vocabulary > MOST_IDS:
        raise ConfigError(
            f"distill.cache_kind=sampled tells {MOST_IDS:,} ids apart, not {vocabulary:,}; set cache_kind=hidden"
        )

    def encode(documents: Sequence[Document]) -> Iterator[Columns]:
        batches = [build_batch(group, share_prefixes=True) for group in groups_of(documents, BATCH_TOKENS)]
        for batch, targets in zip(batches, teacher.targets_for(batches), strict=True):
            assert isinstance(targets, TeacherHidden)
            keys = list(keys_of(batch))
            columns = (
                {"hidden": _as_numpy(targets.hidden_ND)}
                if cfg.cache_kind == "hidden"
                else draw(targets, vocabulary, cfg.top_k, _uniforms(keys, cfg.num_samples, cfg.seed))
            )
            start = 0
            for _, count in keys:
                yield {name: column[start : start + count] for name, column in columns.items()}
                start += count

    return encode


def _uniforms(keys: Sequence[tuple[bytes, int]], samples: int, seed: int) -> np.ndarray:
    """Numbers in [0, 1) that follow from a document and the seed alone, whatever batch it is in: [N, S]."""
    rngs = (np.random.default_rng([seed, int.from_bytes(key)]).random((count, samples)) for key, count in keys)
    return np.concatenate([np.empty((0, samples)), *rngs])


def _as_numpy(hidden_ND: Tensor) -> np.ndarray:
    """Bits of 16-bit values as numpy has no bfloat16; fp32 as it is."""
    bits = hidden_ND.contiguous().view(torch.uint16) if hidden_ND.dtype.itemsize == 2 else hidden_ND
    return bits.cpu().numpy()


class CachedTeacher:
    """A finished folder of signals.

    head: makes logits of hidden states, needed for that tier. dtype: of the hidden states.
    Raises: ConfigError if it is another signal than the config asks for, naming what differs, or is not finished;
    IntegrityError naming a damaged shard.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        device: torch.device,
        head: nn.Module | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        check_fingerprint(folder, fingerprint)
        self.folder = folder
        self.tier: str = fingerprint["kept"]["cache_kind"]
        self.device = device
        self._head, self._dtype = head, dtype
        self._reader = ShardReader(folder)

    def targets_for(self, batches: Sequence[Batch]) -> Iterator[TeacherTargets]:
        """Raises: DataError naming a document that the folder lacks."""
        for batch in batches:
            keys = [key for key, _ in keys_of(batch)]
            if len(missing := self._reader.missing(keys)):
                raise DataError(
                    f"distill.cache: {self.folder} lacks {len(missing)} of the {len(keys)} documents from "
                    f"{batch.locations[0]} to {batch.locations[-1]}; run finetune cache with this config: it adds them"
                )
            yield self._targets(self._reader.read(keys))

    def check_holds(self, documents: Iterable[Document]) -> None:
        """Raises: DataError with how many documents the folder lacks, and where the first of them stand."""
        keyed = [(key, document.location) for document in documents if (key := key_of(document)) is not None]
        missing = self._reader.missing([key for key, _ in keyed])
        if len(missing):
            shown = ", ".join(keyed[i][1] for i in missing[:_SHOWN])
            raise DataError(
                f"distill.cache: {self.folder} lacks {len(missing):,} of {len(keyed):,} documents (other rows, "
                f"template, data.max_length or data.train_on), first {shown}; run finetune cache with this config: it "
                "adds them"
            )

    def check_against(self, teacher: Teacher, documents: Sequence[Document], vocabulary: int) -> float:
        """Ask the teacher about some documents again.

        Returns: the mean difference of log-probabilities over the tokens kept, in nats.
        Raises: IntegrityError if it is more than rounding.
        """
        batch = build_batch(documents)
        [mine], [theirs] = self.targets_for([batch]), teacher.targets_for([batch])
        assert isinstance(theirs, TeacherHidden)
        difference = _difference(mine, theirs, vocabulary)
        if not difference <= _SAME_NATS:
            raise IntegrityError(
                f"distill.cache: {self.folder} differs from the teacher by {difference:.3g} nats on average over "
                f"{', '.join(batch.locations)}, which is no rounding; write it again into a new folder"
            )
        return difference

    def _targets(self, columns: Columns) -> TeacherTargets:
        if self.tier == "sampled":
            return teacher_samples(columns, self.device)
        if self.tier == "top":
            return teacher_top_k(columns, self.device)
        assert self._head is not None
        hidden_ND = torch.from_numpy(columns["hidden"]).view(self._dtype).to(self.device)
        return TeacherHidden(hidden_ND, self._head)


def _difference(mine: TeacherTargets, theirs: TeacherHidden, vocabulary: int) -> float:
    """Mean over targets of the difference of log-probabilities, weighed by the cached probabilities, in nats."""
    total = 0.0
    own = chunked_logits(mine.hidden_ND, mine.head, vocabulary) if isinstance(mine, TeacherHidden) else None
    for logits_NV, rows in chunked_logits(theirs.hidden_ND, theirs.head, vocabulary):
        log_probs = torch.log_softmax(logits_NV.float(), -1)
        if own is not None:
            mine_log_probs = torch.log_softmax(next(own)[0].float(), -1)
        else:
            ids, mine_log_probs = _kept(mine, rows)
            log_probs = log_probs.gather(1, ids)
        total += ((mine_log_probs - log_probs).abs() * mine_log_probs.exp()).sum().item()
    return total / max(1, len(theirs.hidden_ND))


def _kept(targets: TeacherTargets, rows: slice) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the tokens of which a signal says the probability itself."""
    if isinstance(targets, TeacherSamples):
        return targets.ids_NK[rows, : targets.top_k], targets.probs_NK[rows, : targets.top_k].log()
    assert isinstance(targets, TeacherTopK)
    return targets.ids_NK[rows], targets.log_probs_NK[rows]
