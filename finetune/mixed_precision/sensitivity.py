"""Measure the KL to the 16-bit model that storing one linear layer in fewer bits costs, for each layer alone.

A change leaves everything before its layer as it is. Those states are computed once, and each change only from its
layer on: half of the work of whole passes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from finetune.data.batch import Batch
from finetune.losses.chunked import chunked_logits, logits_of
from finetune.losses.hidden_states import PackedRows
from finetune.mixed_precision.journal import ALL, MeanKl, Measured
from finetune.mixed_precision.layerwise import LayerwiseModel


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
