"""The knapsack is optimal, its bytes are the planner's and the loaded model's, impossible budgets are refused."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.mixed_precision.choose import Choices, allocate, quant_of, rest_bytes
from finetune.mixed_precision.journal import MeanKl, Sensitivities
from finetune.models.families import shape_of
from finetune.models.load import load_base
from finetune.models.quant.eight_bit import rows_of
from finetune.models.quant.quantize import quantized_layers
from finetune.planning.static_memory import plan_memory
from finetune.system.errors import ConfigError

KINDS = ["nf4", "int8", "none"]


def choices_of(nats: list[tuple[float, float]], widths: list[int]) -> Choices:
    """Build layers of one linear layer each; `nats` are those of nf4 and int8."""
    shapes = {f"model.layers.{i}.mlp.up_proj": (64, width) for i, width in enumerate(widths)}
    measured = {
        (name, kind): MeanKl(kl, 0.0, 1)
        for name, kls in zip(shapes, nats, strict=True)
        for kind, kl in zip(("nf4", "int8"), kls, strict=True)
    }
    found = Sensitivities("base", ["nf4", "int8"], 1, shapes, measured, {})
    return Choices.of(found, 1000, True, "bfloat16")


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.floats(1e-5, 1e-1), st.floats(1e-7, 1e-4), st.sampled_from([64, 128, 512])), min_size=1, max_size=4
    ),
    st.floats(0, 0.999),
)
def test_no_other_allocation_within_the_budget_is_better(layers: list[tuple[float, float, int]], share: float) -> None:
    choices = choices_of([(four, eight) for four, eight, _ in layers], [width for *_, width in layers])
    smallest, largest = (choices.bytes_of(choices.uniform(kind)) for kind in ("nf4", "none"))
    budget = smallest + share * (largest - smallest)
    found = allocate(choices, budget)
    assert choices.bytes_of(found) <= budget
    every = (dict(zip(choices.names, kinds, strict=True)) for kinds in product(KINDS, repeat=len(layers)))
    best = min(choices.nats_of(storage) for storage in every if choices.bytes_of(storage) <= budget)
    assert choices.nats_of(found) <= best + 1e-5 * choices.nats.sum()


def test_more_bytes_never_predict_more_loss() -> None:
    rng = np.random.default_rng(0)
    choices = choices_of([(float(4e-3 * x), float(1e-5 * x)) for x in rng.lognormal(size=12)], [64, 128, 256] * 4)
    smallest, largest = (choices.bytes_of(choices.uniform(kind)) for kind in ("nf4", "none"))
    nats = [choices.nats_of(allocate(choices, budget)) for budget in np.linspace(smallest, largest - 1, 20)]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(nats))


def test_budgets_out_of_reach_are_refused_with_the_sizes() -> None:
    choices = choices_of([(1e-2, 1e-4)] * 2, [4096, 4096])
    smallest, largest = (choices.bytes_of(choices.uniform(kind)) / 1e9 for kind in ("nf4", "none"))
    sizes = rf"nf4={smallest:.6g} GB.*16 bit={largest:.6g} GB"
    with pytest.raises(ConfigError, match=rf"budget_gb=0\.0002: .*{sizes}"):
        allocate(choices, 2e5)
    for budget in (largest * 1e9, 9e9):
        with pytest.raises(ConfigError, match=rf"budget_gb=.*{sizes}(?s:.*)quant\.type=none"):
            allocate(choices, budget)
    assert set(allocate(choices, smallest * 1e9).values()) == {"nf4"}


def test_simple_allocations_fit_and_are_the_largest() -> None:
    choices = choices_of([(1e-2, 1e-4)] * 5, [64] * 5)
    nf4, int8 = choices.bytes_of(choices.uniform("nf4")), choices.bytes_of(choices.uniform("int8"))
    budget = nf4 + (int8 - nf4) * 3 // 5
    simple = choices.simple(budget)
    assert set(simple) == {
        "all nf4",
        "first 2 and last 1 layers int8, others nf4",
        "first 1 and last 0 layers none, others nf4",
    }
    assert list(simple["first 2 and last 1 layers int8, others nf4"].values()) == ["int8", "int8", "nf4", "nf4", "int8"]
    assert all(choices.bytes_of(storage) <= budget for storage in simple.values())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("double", [True, False])
def test_sizes_equal_the_planned_and_the_loaded_ones(base_folder: Path, share: float, double: bool) -> None:
    cfg = ModelConfig(name=str(base_folder))
    plain = load_base(cfg, QuantConfig(type="none"), "cpu")
    linears: Any = {name: tuple(p.shape) for name, p in plain.named_parameters() if name.endswith("_proj.weight")}
    shapes = {name.removesuffix(".weight"): shape for name, shape in linears.items()}
    assert len(shapes) == 28
    kls = np.random.default_rng(1).lognormal(size=28)
    measured = {
        (name, kind): MeanKl(float(kl) * scale, 0.0, 1)
        for name, kl in zip(shapes, kls, strict=True)
        for kind, scale in (("nf4", 1e-3), ("int8", 1e-5))
    }
    found = Sensitivities("base", ["nf4", "int8"], 1, shapes, measured, {})
    choices = Choices.of(found, rest_bytes(cfg, shapes), double, cfg.dtype)
    smallest, largest = (choices.bytes_of(choices.uniform(kind)) for kind in ("nf4", "none"))
    storage = allocate(choices, smallest + share * (largest - smallest))
    quant = quant_of(storage, QuantConfig(double=double))

    shape = shape_of(cfg.name)
    assert shape is not None
    plan = plan_memory(shape, cfg, quant, LoraConfig())
    planned = plan.total_bytes - sum(plan.parts[name] for name in ("adapter", "gradients", "optimizer"))
    assert planned == choices.bytes_of(storage)

    base = load_base(cfg, quant.model_copy(update={"cache": False}), "cpu")
    in_memory = 0
    for _, module in quantized_layers(base, "nf4"):
        state = module.weight.quant_state
        in_memory += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    in_memory += sum(rows_of(module)[1].nbytes for _, module in quantized_layers(base, "int8"))
    in_memory += sum(parameter.nbytes for parameter in base.parameters())
    assert in_memory == choices.bytes_of(storage)
