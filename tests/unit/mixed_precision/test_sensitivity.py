"""Each layer's figure is that of the whole model with this one change, however it was computed."""

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
    """KL to the 16-bit model of whole choices of storage, each in a pass of its own."""
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
def measured(bench) -> dict[str, dict[tuple[str, str], Measured]]:
    """Everything, in both modes."""
    sensitivity = Sensitivity(bench.model, bench.batches)
    return {
        mode: {(found.name, found.kind): found for found in sensitivity.measure(["nf4", "int8"], mode)}
        for mode in ("only", "keep")
    }


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_each_figure_is_that_of_the_whole_model(bench, measured, kind: str) -> None:
    everything = dict.fromkeys(bench.model.linears, kind)
    storages = [everything, *({name: kind} for name in CHANGED), *({**everything, name: "none"} for name in CHANGED)]
    whole = measure_storage(bench.model, bench.batches, storages)
    assert len({mean.kl for mean in whole}) == len(whole) and min(mean.kl for mean in whole) > 0
    keys = [("only", ALL), *(("only", name) for name in CHANGED), *(("keep", name) for name in CHANGED)]
    for (mode, name), mean in zip(keys, whole, strict=True):
        assert measured[mode][name, kind].mean == mean
    assert measured["keep"][ALL, kind].mean == whole[0]


def test_every_layer_is_measured_once_and_the_work_is_what_was_said(bench) -> None:
    work: list[tuple[int, int]] = []
    sensitivity = Sensitivity(bench.model, bench.batches[:1], lambda done, total: work.append((done, total)))
    found = [(each.name, each.kind) for each in sensitivity.measure(["int8"], "only")]
    assert sorted(found) == sorted([(ALL, "int8"), *((name, "int8") for name in bench.model.linears)])
    assert work[-1][0] == work[-1][1] and [done for done, _ in work] == sorted(done for done, _ in work)


def test_what_is_known_is_not_measured_again(bench, measured) -> None:
    known = set(measured["only"]) - {(name, "nf4") for name in CHANGED}
    found = list(Sensitivity(bench.model, bench.batches).measure(["nf4", "int8"], "only", known))
    assert {(each.name, each.kind) for each in found} == {(name, "nf4") for name in CHANGED}
    assert all(each == measured["only"][each.name, "nf4"] for each in found)
    assert not list(Sensitivity(bench.model, bench.batches).measure(["nf4", "int8"], "only", measured["only"]))
