"""The KL of each layer equals that of a whole pass with this one change; divergences and their errors are exact."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from finetune.data.batch import Batch, build_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.mixed_precision.journal import ALL, MeanKl, Measured
from finetune.mixed_precision.layerwise import LayerwiseModel
from finetune.mixed_precision.measure import Sensitivity, divergences, mean_kl
from finetune.ops.limits import LOGITS_VALUES

CHANGED = ("model.layers.0.self_attn.v_proj", "model.layers.2.mlp.down_proj", "model.layers.3.mlp.up_proj")


def measure_storage(
    model: LayerwiseModel, batches: Sequence[Batch], storages: Sequence[dict[str, str]]
) -> list[MeanKl]:
    """Measure the KL to the 16-bit model of whole allocations, each in its own pass."""
    reference = model.run(batches, {})
    found = []
    with torch.no_grad():
        for storage in storages:
            changed = model.run(batches, storage)
            nats = [
                divergences(*each, model.head, model.head.out_features)[0]
                for each in zip(reference, ([hidden] for hidden in changed), strict=True)
            ]
            found.append(mean_kl(nats, batches))
    return found


@pytest.fixture(scope="module")
def measured(bench) -> dict[tuple[str, str], Measured]:
    found = Sensitivity(bench.model, bench.batches).measure(["nf4", "int8"])
    return {(each.name, each.kind): each for each in found}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_each_kl_equals_that_of_a_whole_pass(bench, measured, kind: str) -> None:
    everything = dict.fromkeys(bench.model.linears, kind)
    whole = measure_storage(bench.model, bench.batches, [everything, *({name: kind} for name in CHANGED)])
    assert len({mean.kl for mean in whole}) == len(whole) and min(mean.kl for mean in whole) > 0
    for name, mean in zip((ALL, *CHANGED), whole, strict=True):
        assert measured[name, kind].mean == mean


def test_every_layer_is_measured_once_and_the_share_of_the_work_ends_at_one(bench) -> None:
    sensitivity = Sensitivity(bench.model, bench.batches[:1])
    found, shares = [], []
    for each in sensitivity.measure(["int8"]):
        found.append((each.name, each.kind))
        shares.append(sensitivity.share)
    assert sorted(found) == sorted([(ALL, "int8"), *((name, "int8") for name in bench.model.linears)])
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == pytest.approx(1)


def test_known_measurements_are_not_repeated(bench, measured) -> None:
    known = set(measured) - {(name, "nf4") for name in CHANGED}
    found = list(Sensitivity(bench.model, bench.batches).measure(["nf4", "int8"], known))
    assert {(each.name, each.kind) for each in found} == {(name, "nf4") for name in CHANGED}
    assert all(each == measured[each.name, "nf4"] for each in found)
    assert not list(Sensitivity(bench.model, bench.batches).measure(["nf4", "int8"], measured))


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
    # Sums by document: 2, 0 and 4, around 2 per target.
    assert mean_kl([torch.tensor([1.0, 1.0, 4.0])], [batch]) == MeanKl(2.0, pytest.approx(math.sqrt(8 * 3 / 2) / 3), 3)


def test_the_error_is_that_of_independent_documents() -> None:
    """Documents of one target each give the standard error of a mean; a second equal target changes nothing."""
    nats = torch.rand(40, generator=torch.Generator().manual_seed(0))
    one = mean_kl([nats[:30], nats[30:]], [build_batch([document(3, 1)] * 30), build_batch([document(3, 1)] * 10)])
    assert one.kl == pytest.approx(float(nats.double().mean())) and one.tokens == 40
    assert one.error == pytest.approx(float(nats.double().std()) / math.sqrt(40))
    two = mean_kl([nats.repeat_interleave(2)], [build_batch([document(4, 2)] * 40)])
    assert (two.kl, two.error, two.tokens) == (pytest.approx(one.kl), pytest.approx(one.error), 80)
