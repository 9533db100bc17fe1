"""What is quantized, what is not, and that an evaluation changes nothing in the training."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from finetune.config.schema import QuantConfig
from finetune.models.quant.bit_widths import storage_of
from finetune.models.quant.quantize import check_quantized, linear_names, quantization_config
from finetune.system.errors import ConfigError, FinetuneError

LINEAR = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
IDS = torch.arange(12).reshape(1, 12) * 5 % 300


def quantized(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, tuple(LINEAR.values()))}


@pytest.mark.parametrize("quant_type", list(LINEAR))
def test_every_linear_layer_but_the_head_is_quantized(load, quant_type: Any) -> None:
    model = load(quant_type)
    assert quantized(model) == set(linear_names(model)) - {"lm_head"}
    assert all(isinstance(model.get_submodule(name), LINEAR[quant_type]) for name in quantized(model))
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("double", [True, False])
def test_weights_get_the_configured_settings(load, double: bool) -> None:
    layer = load("nf4", double=double, compute_dtype="float32").model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested is double
    assert layer.compute_dtype == torch.float32


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (["mlp"], [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")]),
        (["layers.1"], None),
        (["*.0.*o_proj", r".*\.1\..*v_proj"], ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.v_proj"]),
        (["lm_head"], []),
    ],
)
def test_exactly_the_skipped_modules_stay_in_16_bit(
    load, quant_type: Any, keep: list[str], kept: list[str] | None
) -> None:
    model = load(quant_type, skip_modules=keep)
    if kept is None:
        kept = [name for name in linear_names(model) if name.startswith("model.layers.1.")]
    assert quantized(model) == set(linear_names(model)) - {"lm_head", *kept}
    assert all(model.get_submodule(name).weight.dtype == torch.bfloat16 for name in kept)


def test_the_head_always_stays_in_16_bit() -> None:
    names = ["a.q_proj", "a.v_proj", "lm_head"]
    stored = storage_of(QuantConfig(skip_modules=["q_proj"]), names, "lm_head")
    assert stored == {"a.q_proj": "none", "a.v_proj": "nf4", "lm_head": "none"}
    with pytest.raises(ConfigError, match="'k_proj' matches no linear layer"):
        storage_of(QuantConfig(skip_modules=["k_proj"]), names, "lm_head")


def test_the_default_compute_dtype_is_never_fp32() -> None:
    config = quantization_config(QuantConfig(), {"lm_head": "none"})
    assert config is not None and config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_config(QuantConfig(type="none"), {}) is None


def test_a_model_quantized_differently_is_an_error(load) -> None:
    model = load("nf4")
    with pytest.raises(FinetuneError, match=r"layers\.0\.self_attn\.q_proj is stored as nf4, not int8"):
        check_quantized(model, QuantConfig(type="int8"))
    with pytest.raises(FinetuneError, match=r"mlp\.up_proj is stored as nf4, not none"):
        check_quantized(model, QuantConfig(skip_modules=["up_proj"]))
    model.model.norm.float()
    with pytest.raises(FinetuneError, match=r"model\.norm\.weight is torch\.float32, not torch\.bfloat16"):
        check_quantized(model, QuantConfig())


@pytest.mark.parametrize("quant_type", ["nf4", "int8", "none"])
def test_an_evaluation_changes_no_gradient(load, quant_type: Any) -> None:
    """Loss and gradient with respect to the first layer's input, with and without an evaluation before; bit for bit."""

    def step(evaluate: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model = load(quant_type)
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(IDS)
            model.generate(IDS, max_new_tokens=3, do_sample=False)
        model.train()
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=IDS).loss
        loss.backward()
        assert embedded.grad is not None
        return loss.detach(), embedded.grad

    (loss, gradient), (loss_after, gradient_after) = step(False), step(True)
    assert loss.equal(loss_after)
    assert gradient.any() and gradient.equal(gradient_after)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_gradients_equal_those_of_the_dequantized_weight(load, quant_type: Any) -> None:
    """Against float64; an fp32 model leaves only rounding."""
    layer = load(quant_type, dtype="float32", compute_dtype="float32").model.layers[0].mlp.up_proj.train()
    generator = torch.Generator().manual_seed(0)
    x: Any = torch.randn(2, 5, 64, generator=generator).requires_grad_()
    upstream = torch.randn(2, 5, 128, generator=generator)
    y = layer(x)
    y.backward(upstream)
    if quant_type == "nf4":
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    else:
        weight = layer.weight.data.double() * layer.state.SCB.double()[:, None] / 127
    torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), upstream.double() @ weight, rtol=1e-5, atol=1e-5)
