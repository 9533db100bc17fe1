"""How an adapter starts."""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes as bnb
import pytest
import torch

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.files import file_tensors
from finetune.models.adapters.inits import INITS, lora_layers, orthogonal, principal, qr
from finetune.models.load import load_base

IDS = torch.arange(20)[None] * 7 % 300


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 16, generator=torch.Generator().manual_seed(0))


def test_principal_is_the_best_approximation_of_its_rank(weight) -> None:
    """Eckart and Young: the error is the sum of the squared singular values left out."""
    lora_A, lora_B = principal(weight, rank=5, scaling=2.0)
    error = (weight - 2.0 * lora_B @ lora_A).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight)[5:].square().sum(), rtol=1e-5, atol=1e-5)


def test_the_randomized_svd_has_almost_the_least_error(weight) -> None:
    torch.manual_seed(0)
    lora_A, lora_B = INITS["pissa_niter_16"](weight, 5, 2.0)
    error = (weight - 2.0 * lora_B @ lora_A).square().sum()
    assert error <= 1.02 * torch.linalg.svdvals(weight)[5:].square().sum()


def test_qr_factors_are_orthonormal_columns_and_their_rows(weight) -> None:
    lora_A, lora_B = qr(weight, rank=16, scaling=1.0)
    torch.testing.assert_close(lora_B.T @ lora_B, torch.eye(16), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lora_B @ lora_A, weight, rtol=1e-5, atol=1e-5)


def test_the_product_of_orthogonal_factors_is_zero(weight) -> None:
    torch.manual_seed(0)
    lora_A, lora_B = orthogonal(weight, rank=6, scaling=1.0)
    assert (lora_A.shape, lora_B.shape) == ((6, 16), (24, 6))
    assert lora_A.any() and lora_B.any()
    torch.testing.assert_close(lora_B @ lora_A, torch.zeros(24, 16), rtol=0, atol=1e-6)


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
@pytest.mark.parametrize("settings", [{}, {"init": "gaussian"}, {"dora": True}, {"dora": True, "rslora": True}])
def test_a_new_adapter_does_not_change_a_bit_of_the_output(load, quant_type: Any, settings: dict[str, Any]) -> None:
    model = load(quant_type)
    with torch.no_grad():
        before = model(IDS).logits
        after = attach_lora(model, LoraConfig(target_modules="all-linear", **settings))(IDS).logits
    assert before.equal(after)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "orthogonal"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_init_from_the_base_changes_only_rounding(load, init: Any, dora: bool) -> None:
    """fp32 leaves only rounding."""
    model = load("none", dtype="float32")
    with torch.no_grad():
        before = model(IDS).logits
        after = attach_lora(model, LoraConfig(target_modules="all-linear", init=init, dora=dora))(IDS).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("alpha", [8.0, 40.0])
def test_loftq_compensates_the_quantization_error_for_every_alpha(load, make_base, alpha: float) -> None:
    model, original = load("nf4", skip_modules=["layers.0.self_attn.q_proj"]), load("none")
    torch.manual_seed(0)
    adapted = attach_lora(model, LoraConfig(init="loftq", rank=8, alpha=alpha, target_modules="all-linear"))
    for name, layer in cast(Any, lora_layers(adapted)):
        base = layer.get_base_layer()
        update = layer.get_delta_weight("default")
        if base.weight.dtype != torch.uint8:
            assert not update.any(), name
            continue
        stored = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
        lost = original.get_submodule(name).weight.float() - stored
        left_over = torch.linalg.svdvals(lost)[8:].square().sum()
        torch.testing.assert_close((lost - update).square().sum(), left_over, rtol=1e-3, atol=1e-6)


def test_loftq_reads_shards(make_base) -> None:
    starts = []
    for size in ("5GB", "60KB"):
        folder = str(make_base(max_shard_size=size))
        model = attach_lora(load_base(ModelConfig(name=folder), QuantConfig(), "cpu"), LoraConfig(init="loftq"))
        starts.append(
            torch.cat([factors.flatten() for name, factors in file_tensors(model).items() if "lora_A" in name])
        )
    assert starts[0].any() and starts[0].equal(starts[1])
