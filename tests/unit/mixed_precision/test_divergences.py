"""KL of hidden states through a head, and the standard error of its mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from finetune.data.batch import build_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.mixed_precision.divergences import divergences, documents_of_targets, mean_kl
from finetune.ops.limits import LOGITS_VALUES


def document(length: int, targets: int) -> Document:
    labels = np.full(length, IGNORE_INDEX, np.int32)
    labels[length - targets :] = 1
    return Document(np.arange(length, dtype=np.int32), labels, f"rows:{length}")


def test_divergences_equal_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGITS_VALUES, "cpu", 50 * 4)  # chunks of a few rows
    torch.manual_seed(0)
    head, reference = nn.Linear(8, 60, bias=False).requires_grad_(False), torch.randn(11, 8)
    changed = [reference + 0.1 * torch.randn(11, 8), reference.clone()]
    found = divergences(reference, changed, head, 50)
    weight = head.weight[:50].double()
    log_p = (reference.double() @ weight.T).log_softmax(-1)
    for number, hidden in enumerate(changed):
        log_q = (hidden.double() @ weight.T).log_softmax(-1)
        exact = (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(found[number].double(), exact, rtol=1e-3, atol=1e-6)
    assert found[0].min() > 1e-4


def test_each_target_belongs_to_its_document() -> None:
    batch = build_batch([document(4, 2), document(3, 0), document(5, 1)])
    assert documents_of_targets(batch).tolist() == [0, 0, 2]


def test_the_error_is_that_of_independent_documents() -> None:
    """Documents of one target each give the standard error of a mean; a second equal target changes nothing."""
    nats = torch.rand(40, generator=torch.Generator().manual_seed(0))
    one = mean_kl([nats[:30], nats[30:]], [build_batch([document(3, 1)] * 30), build_batch([document(3, 1)] * 10)])
    assert one.kl == pytest.approx(float(nats.double().mean())) and one.tokens == 40
    assert one.error == pytest.approx(float(nats.double().std()) / math.sqrt(40))
    two = mean_kl([nats.repeat_interleave(2)], [build_batch([document(4, 2)] * 40)])
    assert (two.kl, two.error, two.tokens) == (pytest.approx(one.kl), pytest.approx(one.error), 80)
