"""KL of changed models to the 16-bit model, per target, with the standard error of its mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.data.batch import Batch
from finetune.data.encoded import IGNORE_INDEX
from finetune.losses.chunked import chunked_logits, logits_of


@dataclass(frozen=True, slots=True)
class MeanKl:
    """kl: KL(16 bit || changed) in nats per target. error: its standard error over documents. tokens: targets."""

    kl: float
    error: float
    tokens: int


def documents_of_targets(batch: Batch) -> Tensor:
    """Return the index of the document [N] that each target of the batch belongs to."""
    owner_T = torch.repeat_interleave(torch.arange(len(batch.segment_lengths)), torch.tensor(batch.segment_lengths))
    return owner_T[batch.labels[0].cpu() != IGNORE_INDEX]


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
        owner_N, documents = documents_of_targets(batch), len(batch.segment_lengths)
        sums.append(torch.zeros(documents, dtype=torch.float64).index_add_(0, owner_N, nats_N.double()))
        counts.append(torch.bincount(owner_N, minlength=documents).double())
    sum_D, count_D = torch.cat(sums), torch.cat(counts)
    tokens, documents = float(count_D.sum()), len(count_D)
    kl = float(sum_D.sum()) / tokens
    spread = float((sum_D - kl * count_D).square().sum())
    error = math.sqrt(spread * documents / max(1, documents - 1)) / tokens
    return MeanKl(kl, error, int(tokens))
