"""Loading, quantizing and adapting on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.files import check_adapter, save_adapter
from finetune.models.adapters.inits import lora_layers
from finetune.models.load import load_base
from finetune.models.quant import four_bit
from finetune.models.tokenizer import quiet
from finetune.system.errors import ResourceError

pytestmark = pytest.mark.gpu

IDS = torch.arange(40).reshape(2, 20) * 7 % 300


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A random two-layer Qwen2 in bf16."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("base")
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    return ModelConfig(name=str(folder))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS.cuda()).logits


def test_the_default_device_is_this_ranks_gpu(base: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert {parameter.device for parameter in load_base(base, QuantConfig()).parameters()} == {torch.device("cuda", 0)}


@pytest.mark.parametrize("quant_type", ["nf4", "int8", "none"])
@pytest.mark.parametrize("dora", [False, True])
def test_trained_saved_and_reloaded_by_peft(base: ModelConfig, tmp_path: Path, quant_type: Any, dora: bool) -> None:
    quant = QuantConfig(type=quant_type)
    model = attach_lora(load_base(base, quant), LoraConfig(target_modules="all-linear", dora=dora))
    before = logits(model)
    model.train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS.cuda(), labels=IDS.cuda()).loss.backward()
        optimizer.step()
    save_adapter(model, tmp_path)
    check_adapter(tmp_path, model)
    after = logits(model)
    with quiet():
        reloaded = logits(peft.PeftModel.from_pretrained(load_base(base, quant), str(tmp_path)))
    torch.testing.assert_close(reloaded, after, rtol=0, atol=1e-2)
    assert (after - before).abs().max() > 5e-2


@pytest.mark.parametrize("double", [False, True])
def test_weights_are_bit_identical_to_transformers_with_and_without_cache(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, double: bool
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=["lm_head"],
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(
            base.name, quantization_config=settings, dtype=torch.bfloat16, device_map={"": 0}
        )
    quant = QuantConfig(double=double, keep_dequantized=True)
    expected = {**theirs.state_dict(), **dict(theirs.named_buffers())}
    for start in ("first", "next"):
        if start == "next":
            monkeypatch.setattr(four_bit, "quantize", None)
        ours = load_base(base, quant)
        found = {**ours.state_dict(), **dict(ours.named_buffers())}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].device == tensor.device and found[name].equal(tensor), (start, name)
        layer = ours.model.layers[0].mlp.up_proj
        assert layer.resident_weight.is_cuda and layer.weight.quant_state.absmax.is_cuda
        assert layer.resident_weight.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state))


def test_loftq_equals_that_of_peft_if_alpha_is_the_rank(base: ModelConfig) -> None:
    """PEFT ignores alpha / rank."""
    cfg = LoraConfig(rank=8, alpha=8.0)
    ours = attach_lora(load_base(base, QuantConfig()), cfg.model_copy(update={"init": "loftq"}))
    peers = attach_lora(load_base(base, QuantConfig()), cfg)
    peft.replace_lora_weights_loftq(peers, model_path=base.name)
    layers: dict[str, Any] = dict(lora_layers(ours))
    expected: dict[str, Any] = dict(lora_layers(peers))
    for name, layer in layers.items():
        found = layer.get_delta_weight("default")
        torch.testing.assert_close(found, expected[name].get_delta_weight("default"), rtol=1e-2, atol=1e-5)


def test_a_model_that_does_not_fit_is_a_resource_error(tmp_path: Path) -> None:
    config = Qwen2Config(vocab_size=65536, hidden_size=2048, intermediate_size=64, num_hidden_layers=1)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0005)
    try:
        with pytest.raises(ResourceError, match="does not fit into GPU memory"):
            load_base(ModelConfig(name=str(tmp_path)), QuantConfig(type="none"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
