"""The arithmetic of what is held whatever the rows are is what real models and adapters hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune import load_config
from finetune.config.schema import RunConfig
from finetune.models.adapters.attach import attach_lora
from finetune.models.families import FAMILIES, QWEN25_SHAPES
from finetune.planning.inputs import plan_inputs
from finetune.planning.static_memory import (
    StaticMemory,
    bytes_per_weight,
    layer_precisions,
    linear_shapes,
    parameters_of,
    plan_memory,
    trained_parameters,
)

SHAPE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def run(*overrides: str) -> RunConfig:
    return load_config("lora.yaml", [*overrides], needs_data=False)


def static_of(cfg: RunConfig, shape: dict[str, Any]) -> StaticMemory:
    return plan_inputs(cfg, shape, device_type="cpu").static


@pytest.mark.parametrize("size", QWEN25_SHAPES)
def test_parameters_are_those_of_the_model(size):
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN25_SHAPES[size]))
    assert parameters_of(QWEN25_SHAPES[size]) == model.num_parameters()
    plan = static_of(run("quant.type=none"), QWEN25_SHAPES[size])
    base = plan.total_bytes - sum(plan.parts[name] for name in ("adapter", "gradients", "optimizer"))
    assert base == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("lora.target_modules=all-linear", "lora.rank=4"),
        ("lora.dora=true",),
        ("lora.freeze_a=true",),
        ("lora.freeze_a=true", "lora.target_modules=all-linear", "lora.rank_pattern={down_proj: 2, q_proj: 3}"),
        ("lora.layers_to_transform=[1]",),
        ("lora.target_modules=all-linear", "lora.rank_pattern={down_proj: 2, q_proj: 3}"),
        ("lora.modules_to_save=[norm]",),
        ("lora.modules_to_save=[embed_tokens]",),
        (r"lora.target_modules='.*layers\.[12]\.mlp\.(up|down)_proj'",),
    ],
    ids=lambda overrides: " ".join(overrides) or "q,v",
)
def test_trained_values_are_those_that_peft_trains(overrides, tied):
    shape = {**SHAPE, "tie_word_embeddings": tied}
    cfg = run("quant.type=none", *overrides)
    base = Qwen2ForCausalLM(Qwen2Config(**shape)).requires_grad_(False)
    model = attach_lora(base, cfg.lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(shape, cfg.lora) == trained
    held = trained + sum(p.numel() for n, p in model.named_parameters() if "lora_" in n and not p.requires_grad)
    plan = static_of(cfg, shape)
    assert (plan.parts["adapter"], plan.parts["gradients"], plan.parts["optimizer"]) == (
        4 * held,
        4 * trained,
        8 * trained,
    )


@pytest.mark.parametrize("double", [True, False])
def test_a_4_bit_weight_takes_what_bitsandbytes_stores(double):
    weight = torch.randn(256, 512)
    packed, state = quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    scales = [state.absmax, *([state.state2.absmax] if state.state2 else [])]
    stored = packed.nbytes + sum(scale.nbytes for scale in scales)
    cfg = run(f"quant.double={str(double).lower()}")
    assert bytes_per_weight("nf4", cfg.quant) * weight.numel() == stored


def test_each_module_is_counted_in_its_own_precision():
    cfg = run("quant.skip_modules=['layers.0','down_proj']", "quant.int8=[v_proj]")
    assert set(layer_precisions(FAMILIES["qwen2"], 0, cfg.model, cfg.quant).values()) == {"bfloat16"}
    kinds = layer_precisions(FAMILIES["qwen2"], 1, cfg.model, cfg.quant)
    assert (kinds["q_proj"], kinds["v_proj"], kinds["down_proj"]) == ("nf4", "int8", "bfloat16")
    assert layer_precisions(FAMILIES["qwen2"], 1, cfg.model, run("quant.type=none").quant)["up_proj"] == "bfloat16"
    linears = linear_shapes(SHAPE)
    size = {name: out * inputs for name, (out, inputs) in linears.items()}
    parts = plan_memory(SHAPE, cfg.model, cfg.quant, cfg.lora).parts
    assert parts["linears in int8"] == 2 * (size["v_proj"] + 4 * linears["v_proj"][0])
    assert parts["linears in bfloat16"] == 2 * (sum(size.values()) + 2 * size["down_proj"])
    four_bit = sum(size.values()) - size["v_proj"] - size["down_proj"]
    assert parts["linears in nf4"] == 2 * four_bit * bytes_per_weight("nf4", cfg.quant)


def test_a_resident_base_is_held_twice_where_it_is_in_4_bit():
    plain, resident = (static_of(run(*words), SHAPE).parts for words in ((), ("quant.keep_dequantized=true",)))
    size = 3 * sum(out * inputs for out, inputs in linear_shapes(SHAPE).values())
    assert resident["16-bit copies of 4-bit linears"] == 2 * size
    assert {**resident} == {**plain, "16-bit copies of 4-bit linears": 2 * size}


def test_new_tokens_train_a_row_of_each_table():
    counts = [
        trained_parameters({**SHAPE, "tie_word_embeddings": tied}, run("lora.new_tokens=['<a>','<b>']").lora)
        - trained_parameters(SHAPE, run().lora)
        for tied in (True, False)
    ]
    assert counts == [2 * 64, 4 * 64]
