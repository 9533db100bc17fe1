"""What each layer is stored as, and that its bytes are those that are in memory."""

from __future__ import annotations

import pytest
import torch

from finetune.config.schema import QuantConfig
from finetune.models.quant.bit_widths import storage_of, stored_bytes
from finetune.models.quant.eight_bit import rows_of
from finetune.models.quant.quantize import quantized_layers
from finetune.system.errors import ConfigError

NAMES = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head"]


def test_names_globs_and_regexes_choose_the_storage() -> None:
    stored = storage_of(QuantConfig(skip_modules=["layers.0"], int8=["*.1.*down_proj"]), NAMES, "lm_head")
    assert stored == dict(zip(NAMES, ("none", "none", "nf4", "int8", "none"), strict=True))
    assert storage_of(QuantConfig(int8=[r".*\.q_proj"]), NAMES, "lm_head")[NAMES[1]] == "nf4"


def test_a_glob_over_all_layers_keeps_the_head_in_16_bit() -> None:
    stored = storage_of(QuantConfig(int8=["*"]), NAMES, "lm_head")
    assert {name for name, kind in stored.items() if kind == "int8"} == set(NAMES[:-1]) and stored["lm_head"] == "none"


def test_all_problems_are_reported_together() -> None:
    quant = QuantConfig(skip_modules=["q_prj", "layers.0"], int8=["down_prj", "lm_head", "down_proj"])
    with pytest.raises(ConfigError) as refused:
        storage_of(quant, NAMES, "lm_head")
    lines = str(refused.value).splitlines()
    assert lines == [
        "quant.skip_modules: 'q_prj' matches no linear layer; did you mean q_proj?",
        "quant.int8: 'down_prj' matches no linear layer; did you mean down_proj?",
        "quant.int8: 'lm_head' matches lm_head, which is always in 16 bit; drop it",
        "quant.skip_modules and quant.int8: both match model.layers.0.mlp.down_proj; list each layer in one of them",
    ]


@pytest.mark.parametrize("double", [True, False])
def test_computed_bytes_equal_those_in_memory(load, double: bool) -> None:
    """Weights and scales of every layer; not the tables, which are the same for all."""
    model = load(
        "nf4", double=double, skip_modules=["layers.0.mlp"], int8=["layers.1.mlp", "layers.0.self_attn.k_proj"]
    )
    in_memory = {}
    for name, module in quantized_layers(model, "nf4"):
        state = module.weight.quant_state
        outer = state.state2.absmax.nbytes if state.nested else 0
        in_memory[name] = module.weight.nbytes + state.absmax.nbytes + outer
    for name, module in quantized_layers(model, "int8"):
        in_memory[name] = sum(part.nbytes for part in rows_of(module))
    kept = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]
    in_memory |= {name: model.get_submodule(name).weight.nbytes for name in kept}
    assert len(in_memory) == 14
    shapes = {
        name: (model.get_submodule(name).out_features, model.get_submodule(name).in_features) for name in in_memory
    }
    kinds = dict.fromkeys(in_memory, "nf4") | dict.fromkeys(kept, "none")
    kinds |= {name: "int8" for name, _ in quantized_layers(model, "int8")}
    for name, size_bytes in in_memory.items():
        assert stored_bytes(kinds[name], shapes[name], double, "bfloat16") == size_bytes, name


def test_unquantized_weights_take_the_bytes_of_their_dtype(load) -> None:
    assert stored_bytes("none", (3, 5), True, "float32") == torch.empty(3, 5).nbytes
