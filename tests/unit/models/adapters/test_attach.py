"""Attaching an adapter; taking its weights out and putting them back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from finetune.config.schema import LoraConfig
from finetune.models.adapters.attach import adapter_state, attach_lora, load_adapter_state
from finetune.models.adapters.inits import lora_layers
from finetune.system.errors import ConfigError, IntegrityError

IDS = torch.arange(20)[None] * 7 % 300
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "dora": {"dora": True},
    "modules_to_save": {"modules_to_save": ["norm", "embed_tokens"]},
    "new_tokens": {"new_tokens": ["<call>"]},
}


def disturb(model) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("quant_type", ["nf4", "int8", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trained_weights_are_fp32_and_the_base_is_frozen(load, quant_type: Any, dtype: Any) -> None:
    model = attach_lora(
        load(quant_type, dtype=dtype), LoraConfig(modules_to_save=["norm"], target_modules="all-linear")
    )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert len(trained) == 2 * 14 + 1


def test_layers_get_the_configured_settings(load) -> None:
    cfg = LoraConfig(
        rank=4,
        alpha=6.0,
        dropout=0.25,
        rslora=True,
        target_modules="all-linear",
        layers_to_transform=[1],
        rank_pattern={"q_proj": 9},
        alpha_pattern={"v_proj": 2.5},
    )
    adapted: dict[str, Any] = dict(lora_layers(attach_lora(load("nf4"), cfg)))
    assert len(adapted) == 7 and all(name.startswith("model.layers.1.") for name in adapted)
    for name, layer in adapted.items():
        rank = 9 if name.endswith("q_proj") else 4
        alpha = 2.5 if name.endswith("v_proj") else 6.0
        assert (layer.r["default"], layer.scaling["default"]) == (rank, alpha / rank**0.5)
        assert layer.lora_dropout["default"].p == 0.25


def test_a_saved_embedding_stays_tied_to_its_head(load) -> None:
    model = attach_lora(load("nf4", tied=True), LoraConfig(modules_to_save=["embed_tokens"]))
    disturb(model)
    assert model.get_input_embeddings().weight.equal(model.get_output_embeddings().weight)
    model(input_ids=IDS, labels=IDS).loss.backward()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    assert len(names) == 1


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_loaded_state_equals_the_saved_one(load, tokenizer, settings: dict[str, Any]) -> None:
    cfg = LoraConfig(rank=4, target_modules="all-linear", **settings)
    first, second = (attach_lora(load("nf4"), cfg, copy.deepcopy(tokenizer)) for _ in range(2))
    disturb(first)
    state = adapter_state(first)
    load_adapter_state(second, state)
    again = adapter_state(second)
    assert again.keys() == state.keys()
    assert all(again[name].equal(state[name]) for name in state)
    assert first(IDS).logits.equal(second(IDS).logits)


def test_the_state_is_a_copy(load) -> None:
    model = attach_lora(load("nf4"), LoraConfig())
    state = adapter_state(model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    disturb(model)
    assert all(state[name].equal(before[name]) for name in state)


def test_a_state_that_does_not_fit_is_an_error_and_loads_nothing(load) -> None:
    model = attach_lora(load("nf4"), LoraConfig(rank=4))
    before = adapter_state(model)
    state = {name: tensor + 1 for name, tensor in before.items()}
    missing, wrong_shape, wrong_dtype, *_ = state
    del state[missing]
    state[wrong_shape] = state[wrong_shape][:-1]
    state[wrong_dtype] = state[wrong_dtype].bfloat16()
    state["stranger"] = torch.zeros(1)
    with pytest.raises(IntegrityError) as error:
        load_adapter_state(model, state)
    for said in (f"{missing} is missing", "stranger is not part", f"{wrong_shape} is [", f"{wrong_dtype} is "):
        assert said in str(error.value)
    after = adapter_state(model)
    assert all(after[name].equal(before[name]) for name in before)


def test_a_pissa_state_of_another_start_is_an_error(load) -> None:
    """The randomized SVD of another seed leaves another base behind: its factors would not add up."""

    def attach(seed: int):
        torch.manual_seed(seed)
        return attach_lora(load("none", dtype="float32"), LoraConfig(rank=4, init="pissa_niter_16"))

    model = attach(0)
    start = model(IDS).logits
    disturb(model)
    state = adapter_state(model)
    same = attach(0)
    load_adapter_state(same, state)
    assert same(IDS).logits.equal(model(IDS).logits) and not same(IDS).logits.equal(start)
    with pytest.raises(IntegrityError, match="another base or seed"):
        load_adapter_state(attach(1), state)


def test_a_second_adapter_is_an_error(load) -> None:
    model: Any = attach_lora(load("nf4"), LoraConfig())
    with pytest.raises(ConfigError, match="has an adapter already"):
        attach_lora(model, LoraConfig())


def test_an_adapter_can_be_disabled_and_generate_works(load) -> None:
    """What attach_lora gives is PEFT's: its adapter can be switched off, and generate works."""
    model = load("nf4")
    base = model(IDS).logits
    adapted = attach_lora(model, LoraConfig())
    disturb(adapted)
    assert not adapted(IDS).logits.equal(base)
    with adapted.disable_adapter():
        assert adapted(IDS).logits.equal(base)
    assert adapted.generate(input_ids=IDS, max_new_tokens=2, do_sample=False).shape[1] <= 22
