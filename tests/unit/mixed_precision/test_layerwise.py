"""A model computed one layer at a time in fp32 equals the whole model with the same storage."""

from __future__ import annotations

import pytest
import torch

from finetune.config.schema import QuantConfig
from finetune.losses.hidden_states import target_states
from finetune.mixed_precision.layerwise import LayerwiseModel
from finetune.models.load import load_base
from finetune.models.quant.bit_widths import storage_of
from finetune.system.errors import ConfigError

MIXED = QuantConfig(
    skip_modules=["layers.1"], int8=["layers.2.mlp", "layers.0.self_attn.v_proj"], compute_dtype="float32"
)


def states_of(bench, quant: QuantConfig) -> list[torch.Tensor]:
    """Compute the states of the whole model in fp32."""
    model = load_base(bench.cfg.model.model_copy(update={"dtype": "float32"}), quant, "cpu").eval()
    with torch.no_grad():
        return [target_states(model, batch).hidden_ND for batch in bench.batches]


@pytest.mark.parametrize("quant", [QuantConfig(type="none"), MIXED], ids=["16 bit", "mixed"])
def test_states_equal_those_of_the_whole_model(bench, quant: QuantConfig) -> None:
    model = LayerwiseModel(bench.cfg.model, quant, torch.device("cpu"))
    storage = storage_of(quant, list(model.linears), "lm_head")
    storage.pop("lm_head")
    for found, wanted in zip(model.run(bench.batches, storage), states_of(bench, quant), strict=True):
        # Where an input of an 8-bit product falls between two codes, rounding decides.
        allowed = 1e-4 if quant.type == "none" else 2e-2
        assert (found - wanted).norm() <= allowed * wanted.norm()


def test_a_layer_is_restored_after_a_change(bench) -> None:
    model, batch = bench.model, bench.batches[0]
    rows, states = model.enter(batch)
    model.load(0, {})
    before = model.advance(rows, states)
    changed = {}
    for kind in ("nf4", "int8"):
        with model.stored("model.layers.0.mlp.up_proj", kind):
            changed[kind] = model.advance(rows, states)
    assert model.advance(rows, states).equal(before)
    assert 0 < (changed["int8"] - before).norm() < 0.2 * (changed["nf4"] - before).norm()


def test_other_attention_is_refused(bench) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention=eager"):
        LayerwiseModel(bench.cfg.model.model_copy(update={"attention": "eager"}), QuantConfig(), torch.device("cpu"))
