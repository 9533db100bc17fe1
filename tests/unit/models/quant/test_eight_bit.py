"""8-bit layers beside 4-bit ones: the same as those of quant.type=int8, cached, trained through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.models import load as loading
from finetune.models.adapters.attach import attach_lora
from finetune.models.load import load_base
from finetune.models.quant import eight_bit, four_bit
from finetune.models.quant.eight_bit import dequantize_rows, quantize_rows, rows_of
from finetune.models.quant.quantize import check_quantized, quantized_layers, stored_as
from finetune.system.errors import FinetuneError

IDS = torch.arange(12).reshape(1, 12) * 5 % 300
MIXED: dict[str, Any] = {"skip_modules": ["layers.0.self_attn.o_proj"], "int8": ["layers.1.mlp", "q_proj"]}
EIGHT = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"] + [
    f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")
]


def test_each_layer_equals_that_of_a_base_of_its_type(load, untouched) -> None:
    mixed, eight, four = load("nf4", **MIXED), untouched("int8"), untouched("nf4")
    assert sorted(name for name, _ in quantized_layers(mixed, "int8")) == sorted(EIGHT)
    for name, module in mixed.named_modules():
        kind = stored_as(module)
        if kind == "int8":
            theirs = eight.get_submodule(name)
            assert all(a.equal(b) for a, b in zip(rows_of(module), rows_of(theirs), strict=True))
            assert module.state.threshold == theirs.state.threshold > 0
            assert not module.state.has_fp16_weights and not module.weight.requires_grad
            x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0)).bfloat16() * 9
            assert module(x).equal(theirs(x))  # some of it beyond the threshold
        elif kind == "nf4":
            assert module.weight.data.equal(four.get_submodule(name).weight.data)
    assert stored_as(mixed.model.layers[0].self_attn.o_proj) == "none"


def test_rows_quantized_in_pieces_equal_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, largest, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    monkeypatch.setattr(eight_bit, "_CHUNK", 24 * 5)
    pieces = quantize_rows(weight)
    assert pieces[0].equal(codes) and pieces[1].equal(largest)
    exact = codes.double() * largest.double()[:, None] / 127
    torch.testing.assert_close(dequantize_rows(codes, largest, torch.float32).double(), exact, rtol=1e-6, atol=0)


def same(first: Any, second: Any) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    return tmp_path / "quantized"


def test_the_second_start_quantizes_nothing(load, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("nf4", **MIXED)
    monkeypatch.setattr(four_bit, "quantize", None)
    monkeypatch.setattr(four_bit, "quantize_rows", None)
    second = load("nf4", **MIXED)
    assert same(first, second)
    assert first(IDS).logits.equal(second(IDS).logits)


def test_other_8_bit_layers_use_another_entry(load, home: Path) -> None:
    def entries() -> int:
        return len(
            [path for path in home.iterdir() if path.is_dir() and path.name != "digests" and path.name[0] != "."]
        )

    for count, quant in enumerate(
        ({}, {"int8": ["q_proj"]}, {"int8": ["v_proj"]}, {"skip_modules": ["v_proj"]}), start=1
    ):
        load("nf4", **quant)
        assert entries() == count


def test_files_with_other_tensor_names_give_the_same_model(load, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load("nf4", **MIXED)
    monkeypatch.setattr(loading, "load_four_bit", lambda *_, **__: None)
    assert same(ours, load("nf4", **MIXED))


def test_a_model_quantized_differently_is_an_error(load) -> None:
    with pytest.raises(FinetuneError, match=r"layers\.0\.self_attn\.q_proj is stored as int8, not nf4"):
        check_quantized(load("nf4", **MIXED), QuantConfig())
    with pytest.raises(FinetuneError, match=r"layers\.1\.mlp\.up_proj is stored as nf4, not int8"):
        check_quantized(load("nf4"), QuantConfig(**MIXED))


def test_all_adapters_get_gradients_and_an_evaluation_does_not_change_them(make_base) -> None:
    """Gradients of all adapters, bit for bit, with and without an evaluation before."""

    def gradients(evaluate: bool) -> dict[str, torch.Tensor]:
        base = load_base(ModelConfig(name=str(make_base())), QuantConfig(**MIXED), "cpu")
        torch.manual_seed(0)
        model = attach_lora(base, LoraConfig(target_modules="all-linear", init="gaussian"))
        kinds = {type(module) for module in model.modules()}
        assert {Linear4bit, Linear8bitLt} <= kinds
        with torch.no_grad():  # B starts at zero, and passes nothing on to A then
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(1), std=0.02)
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(IDS)
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, evaluated = gradients(False), gradients(True)
    assert len(plain) == 28 and all(gradient.any() for gradient in plain.values())
    assert all(plain[name].equal(evaluated[name]) for name in plain)
