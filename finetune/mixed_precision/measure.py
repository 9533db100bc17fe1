"""Measure the KL to the 16-bit model that storing one linear layer in fewer bits costs, for each layer alone.

A change leaves everything before its layer as it is. Those states are computed once, and each change only from its
layer on: half of the work of whole passes. A folder gets every value, a table and a picture.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from finetune.config.command_options import SensitivityOptions
from finetune.config.schema import RunConfig
from finetune.data.batch import Batch, build_batch, groups_of
from finetune.data.documents import Documents, evenly_spaced
from finetune.data.loader import load_all_rows, load_media_processor
from finetune.distill.fingerprint import teacher_weights
from finetune.losses.chunked import chunked_logits, logits_of
from finetune.losses.hidden_states import PackedRows
from finetune.mixed_precision.journal import (
    ALL,
    SENSITIVITY_VERSION,
    Journal,
    MeanKl,
    Measured,
    Sensitivities,
    write_summary,
)
from finetune.mixed_precision.layerwise import LayerwiseModel
from finetune.system.accelerator import default_device
from finetune.system.console import Log, Pace
from finetune.system.format import format_duration
from finetune.system.machine import use_all_cores


class Sensitivity:
    """A measurement of a model on some rows; `share` is the part of the work that is done."""

    def __init__(self, model: LayerwiseModel, batches: Sequence[Batch]):
        self.model, self.batches = model, batches
        self.share = 0.0
        self._passes = 1  # of all rows through one layer, in total

    def measure(self, kinds: Sequence[str], known: Collection[tuple[str, str]] = ()) -> Iterator[Measured]:
        """Yield each measurement as soon as it is made: all layers at once first, then each layer alone.

        Args:
            kinds: 4-bit kinds and int8.
            known: (name, kind) of the measurements to leave out.
        """
        layers = self.model.layers
        uniform = [kind for kind in kinds if (ALL, kind) not in known]
        changes = [
            [(name, kind) for name in self.model.linears_of(index) for kind in kinds if (name, kind) not in known]
            for index in range(layers)
        ]
        if not uniform and not any(changes):
            return
        self._passes = layers * (1 + len(uniform))
        if any(changes):
            self._passes += sum(1 + len(some) * (layers - index) for index, some in enumerate(changes))
        reference = self._run({})
        for kind in uniform:
            yield Measured(ALL, kind, self._mean(reference, [self._run(dict.fromkeys(self.model.linears, kind))])[0])
        if any(changes):
            yield from self._measure_single(changes, reference)

    def _measure_single(
        self, changes: Sequence[Sequence[tuple[str, str]]], reference: list[Tensor]
    ) -> Iterator[Measured]:
        rows, states = map(list, zip(*map(self.model.enter, self.batches), strict=True))
        for index, here in enumerate(changes):
            self.model.load(index, {})
            changed = []
            for name, kind in here:
                with self.model.stored(name, kind):
                    changed.append(self._advance(rows, states))
            states = self._advance(rows, states)
            for later in range(index + 1, self.model.layers) if here else ():
                self.model.load(later, {})
                changed = [self._advance(rows, each) for each in changed]
            hidden = [[self.model.leave(*p) for p in zip(each, rows, strict=True)] for each in changed]
            for (name, kind), mean in zip(here, self._mean(reference, hidden), strict=True):
                yield Measured(name, kind, mean)

    def _advance(self, rows: Sequence[PackedRows], states: Sequence[Tensor]) -> list[Tensor]:
        self.share += 1 / self._passes
        return [self.model.advance(*pair) for pair in zip(rows, states, strict=True)]

    def _run(self, storage: dict[str, str]) -> list[Tensor]:
        self.share += self.model.layers / self._passes
        return self.model.run(self.batches, storage)

    def _mean(self, reference: Sequence[Tensor], changed: Sequence[Sequence[Tensor]]) -> list[MeanKl]:
        """Average for each changed model; both arguments hold states [N, D] of each batch's targets."""
        head, vocabulary = self.model.head, self.model.head.out_features
        nats = [
            divergences(reference_ND, [each[number] for each in changed], head, vocabulary)
            for number, reference_ND in enumerate(reference)
        ]
        return [mean_kl([nats_CN[row] for nats_CN in nats], self.batches) for row in range(len(changed))]


@torch.no_grad()
def divergences(reference_ND: Tensor, changed_ND: Sequence[Tensor], head: nn.Module, vocabulary: int) -> Tensor:
    """Compute KL(reference || changed) in nats [C, N] of C changed models at each target, fp32 on the CPU.

    The reference's logits are computed once. Negative values are rounding errors of about 1e-7.
    """
    nats_CN = torch.empty(len(changed_ND), len(reference_ND))
    for logits_NV, rows in chunked_logits(reference_ND, head, vocabulary):
        log_p_NV = logits_NV.float().log_softmax(-1)
        p_NV = log_p_NV.exp()
        for number, hidden_ND in enumerate(changed_ND):
            log_q_NV = logits_of(hidden_ND[rows], head, vocabulary).float().log_softmax(-1)
            nats_CN[number, rows] = (p_NV * (log_p_NV - log_q_NV)).sum(-1).cpu()
    return nats_CN


def mean_kl(nats: Sequence[Tensor], batches: Sequence[Batch]) -> MeanKl:
    """Average over all targets of all batches; `nats` holds [N] for each batch.

    Targets of a document are not independent, so the error is that of a ratio of sums over documents.
    Source: Cochran 1977, Sampling Techniques, section 2.11.
    """
    sums, counts = [], []
    for nats_N, batch in zip(nats, batches, strict=True):
        documents = len(batch.segment_lengths)
        owner_T = torch.repeat_interleave(torch.arange(documents), torch.tensor(batch.segment_lengths))
        owner_N = owner_T[batch.targets]
        sums.append(torch.zeros(documents, dtype=torch.float64).index_add_(0, owner_N, nats_N.double()))
        counts.append(torch.bincount(owner_N, minlength=documents).double())
    sum_D, count_D = torch.cat(sums), torch.cat(counts)
    tokens, documents = float(count_D.sum()), len(count_D)
    kl = float(sum_D.sum()) / tokens
    spread = float((sum_D - kl * count_D).square().sum())
    error = math.sqrt(spread * documents / max(1, documents - 1)) / tokens
    return MeanKl(kl, error, int(tokens))


# In smaller batches, reading a layer's weights takes longer than the products with them.
_LEAST_BATCH_TOKENS = 2048


def measure_sensitivity(cfg: RunConfig, options: SensitivityOptions, log: Log) -> Sensitivities:
    """Measure every linear layer that `options.out` does not hold yet, and write that folder.

    Raises:
        ConfigError: the folder holds something else.
        FinetuneError: as loading the model and the rows.
    """
    kinds = ["nf4", "int8"] if options.type == "both" else [options.type]
    documents = sample(load_rows(cfg, log)[0], options.rows)
    made_from = {
        "version": SENSITIVITY_VERSION,
        "weights": teacher_weights(cfg.model),
        "rows": documents.digest(),
        "kinds": kinds,
        "double": cfg.quant.double,
        "compute_dtype": cfg.quant.compute_dtype,
        "dtype": cfg.model.dtype,
    }
    journal = Journal(Path(options.out).expanduser(), made_from)
    media = load_media_processor(cfg.model, cfg.data)
    model = LayerwiseModel(cfg.model, cfg.quant, working_device(), media)
    count = (1 + len(model.linears)) * len(kinds)
    if journal.measured:
        log(f"sensitivity: resumed={journal.folder}, measured={len(journal.measured)}/{count}")
    began, pace = time.monotonic(), Pace()
    sensitivity = Sensitivity(model, batches_of(documents, cfg.data.max_length))
    for found in sensitivity.measure(kinds, journal.measured):
        journal.append(found)
        if pace.is_due():
            left = format_duration((time.monotonic() - began) * (1 - sensitivity.share) / sensitivity.share)
            log(f"sensitivity: measured={len(journal.measured)}/{count}, time_left={left}")
    result = Sensitivities(cfg.model.name, kinds, len(documents), dict(model.linears), journal.measured, made_from)
    result.save(journal.folder)
    write_summary(result, journal.folder, cfg.quant.double, cfg.model.dtype)
    return result


def working_device() -> torch.device:
    """Return this machine's device, and set the number of threads on a CPU."""
    device = default_device()
    use_all_cores(device.type)
    return device


def load_rows(cfg: RunConfig, log: Log) -> tuple[Documents, Documents]:
    """Load the training documents and the held-out documents (possibly none) of a run's config."""
    # A stream is read to its end: the beginning is not a sample of all its rows.
    _, _, data = load_all_rows(cfg, log)
    held_out = [source.documents for source in data.eval]
    return data.documents, Documents.join(held_out) if held_out else data.documents[:0]


def sample(documents: Documents, rows: int) -> Documents:
    """Select at most `rows` documents, evenly spaced."""
    return documents.select(np.array(evenly_spaced(len(documents), rows), dtype=np.int64))


def batches_of(documents: Documents, max_length: int) -> Sequence[Batch]:
    """Build batches with only the tokens that the documents' targets need."""
    groups = groups_of(documents, max(_LEAST_BATCH_TOKENS, max_length))
    return [build_batch(group, share_prefixes=True) for group in groups]
