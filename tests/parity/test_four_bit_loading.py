"""Loading a 4-bit base equals transformers: bit-identical weights, attributes and training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.models.adapters.attach import attach_lora
from finetune.models.load import load_base
from finetune.models.quant import four_bit
from finetune.models.quant.quantize import keep_weights_trainable_after_eval
from finetune.models.tokenizer import quiet

IDS = torch.arange(24).reshape(2, 12) * 7 % 90
Load = Callable[[Path], Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """`folders(tied)`: a random model in several shards; its matrices end inside a quantization block."""
    made: dict[bool, Path] = {}

    def make(tied: bool) -> Path:
        if tied not in made:
            torch.manual_seed(0)
            config = Qwen2Config(
                vocab_size=97,
                hidden_size=56,
                intermediate_size=99,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=tied,
                eos_token_id=5,
            )
            model = Qwen2ForCausalLM(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            made[tied] = tmp_path_factory.mktemp("base")
            model.generation_config.update(do_sample=True, top_k=7)
            model.bfloat16().save_pretrained(made[tied], max_shard_size="60KB")
            assert len(list(made[tied].glob("*.safetensors"))) > 2
        return made[tied]

    return make


def by_transformers(folder: Path, quant: QuantConfig, dtype: str = "bfloat16") -> Any:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=["lm_head"],
        bnb_4bit_quant_type=quant.type,
        bnb_4bit_use_double_quant=quant.double,
        bnb_4bit_compute_dtype=getattr(torch, quant.compute_dtype),
    )
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=settings,
            dtype=getattr(torch, dtype),
            device_map={"": "cpu"},
            attn_implementation="sdpa",
        )
    model.requires_grad_(False)
    keep_weights_trainable_after_eval(model)
    return model


def by_us(folder: Path, quant: QuantConfig, dtype: Any = "bfloat16") -> Any:
    return load_base(ModelConfig(name=str(folder), dtype=dtype, attention="sdpa"), quant, "cpu")


def all_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return parameters, all buffers, and the quantization state of every packed weight."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def assert_same(ours: Any, theirs: Any) -> None:
    found, expected = all_tensors(ours), all_tensors(theirs)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].equal(tensor), name


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("tied", "dtype"), [(True, "bfloat16"), (False, "bfloat16"), (False, "float16"), (True, "float32")]
)
def test_weights_are_bit_identical_to_transformers(
    folders, monkeypatch: pytest.MonkeyPatch, double: bool, tied: bool, dtype: Any
) -> None:
    """Quantized in pieces at the first load, read from the cache at the second."""
    monkeypatch.setattr(four_bit, "_CHUNK", 1024)
    quant = QuantConfig(double=double)
    theirs = by_transformers(folders(tied), quant, dtype)
    assert_same(by_us(folders(tied), quant, dtype), theirs)
    monkeypatch.setattr(four_bit, "quantize", None)
    assert_same(by_us(folders(tied), quant, dtype), theirs)


@pytest.mark.parametrize("rows", [1, 2, 4, 33, 500, 513])
@pytest.mark.parametrize("double", [True, False])
def test_a_matrix_quantized_in_pieces_is_bit_identical(
    monkeypatch: pytest.MonkeyPatch, rows: int, double: bool
) -> None:
    monkeypatch.setattr(four_bit, "_CHUNK", 4096)
    weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows), dtype=torch.bfloat16)
    like = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=double)
    packed, state = four_bit.quantize(weight, like)
    expected, expected_state = bnb.functional.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    assert packed.equal(expected)
    found, wanted = state.as_dict(packed=True), expected_state.as_dict(packed=True)
    assert found.keys() == wanted.keys() and all(found[key].equal(wanted[key]) for key in wanted)


@pytest.mark.parametrize("cached", [False, True])
def test_attributes_that_peft_and_accelerate_read_are_set(folders, cached: bool) -> None:
    quant = QuantConfig()
    if cached:
        by_us(folders(True), quant)
    ours, theirs = (
        by_us(folders(True), quant.model_copy(update={"cache": cached})),
        by_transformers(folders(True), quant),
    )
    # The hub's commit is ours; the rest are notes of transformers' loading to itself, each read with a default.
    notes = {"_is_hf_initialized", "_weight_conversions", "_use_kernels"}
    assert vars(ours).keys() - {"base_revision", "loaded_as"} == vars(theirs).keys() - notes
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "training", "name_or_path", "dtype"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer) and ours.hf_quantizer.is_trainable
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.generation_config.top_k == 7
    for (name, found), expected in zip(ours.named_modules(), theirs.modules(), strict=True):
        assert type(found) is type(expected), name
        assert not name or vars(found).keys() - notes == vars(expected).keys() - notes, name
        for (key, parameter), peer in zip(found._parameters.items(), expected._parameters.values(), strict=True):
            if parameter is not None and peer is not None:
                state, wanted = vars(parameter), vars(peer)
                different = ("quant_state", "module", "_is_hf_initialized")
                assert {k: v for k, v in state.items() if k not in different} == {
                    k: v for k, v in wanted.items() if k not in different
                }, f"{name}.{key}"
        if isinstance(found, bnb.nn.Linear4bit):
            assert found.weight.module is found and found.quant_state is found.weight.quant_state


@pytest.mark.parametrize("cached", [False, True])
def test_training_is_bit_identical_to_transformers(folders, cached: bool) -> None:
    """Loss and adapter gradients."""
    quant = QuantConfig(cache=cached)
    if cached:
        by_us(folders(True), quant)

    def step(base: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = attach_lora(base, LoraConfig(target_modules="all-linear")).train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return [loss.detach(), *(p.grad for _, p in model.named_parameters() if p.grad is not None)]

    found, expected = step(by_us(folders(True), quant)), step(by_transformers(folders(True), quant))
    assert len(found) == len(expected) > 10
    assert all(ours.equal(theirs) for ours, theirs in zip(found, expected, strict=True))
