"""The KL of each layer equals that of a whole pass with this one change."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from finetune.data.batch import Batch
from finetune.mixed_precision.divergences import MeanKl, divergences, mean_kl
from finetune.mixed_precision.layerwise import LayerwiseModel
from finetune.mixed_precision.sensitivity import ALL, Measured, Sensitivity

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


def test_every_layer_is_measured_once_and_progress_ends_at_its_total(bench) -> None:
    work: list[tuple[int, int]] = []
    sensitivity = Sensitivity(bench.model, bench.batches[:1], lambda done, total: work.append((done, total)))
    found = [(each.name, each.kind) for each in sensitivity.measure(["int8"])]
    assert sorted(found) == sorted([(ALL, "int8"), *((name, "int8") for name in bench.model.linears)])
    assert work[-1][0] == work[-1][1] and [done for done, _ in work] == sorted(done for done, _ in work)


def test_known_measurements_are_not_repeated(bench, measured) -> None:
    known = set(measured) - {(name, "nf4") for name in CHANGED}
    found = list(Sensitivity(bench.model, bench.batches).measure(["nf4", "int8"], known))
    assert {(each.name, each.kind) for each in found} == {(name, "nf4") for name in CHANGED}
    assert all(each == measured[each.name, "nf4"] for each in found)
    assert not list(Sensitivity(bench.model, bench.batches).measure(["nf4", "int8"], measured))
