"""Fused layers equal PEFT: values and gradients of whole models, for supported and unsupported adapters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.data.batch import Batch, build_batch
from finetune.data.encoded import IGNORE_INDEX
from finetune.evaluation.generation import decode
from finetune.losses.cross_entropy import CrossEntropy, score
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.files import check_adapter, save_adapter
from finetune.models.adapters.inits import freeze_a
from finetune.models.fused import FusedDecoderLayer, FusedLayers, fuse_layers
from finetune.models.load import load_base
from finetune.ops import linear
from tests.models import prompts_of, random_qwen2
from tests.parity.test_cross_entropy import documents

LENGTHS = [5, 70, 2, 64, 9, 130, 1]
KINDS: dict[str, dict[str, Any]] = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all linears": {"target_modules": "all-linear"},
    "down alone": {"target_modules": ["down_proj"]},
    "up and o": {"target_modules": ["up_proj", "o_proj"]},
    "rank 1": {"r": 1, "target_modules": ["q_proj", "k_proj"]},
    "rslora": {"use_rslora": True, "target_modules": ["v_proj", "gate_proj"]},
    "dropout": {"lora_dropout": 0.3, "target_modules": "all-linear"},
    "dora": {"use_dora": True, "target_modules": ["v_proj", "down_proj"]},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "first layer only": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "last layer only": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
    "saved modules": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["up_proj", "lm_head"],
        "ensure_weight_tying": True,
    },
}
# Calls in two layers: of `project` (for q, k, v and for o) and of `swiglu_mlp`.
BY_KERNEL = {"dora": (2, 0), "saved modules": (4, 0)}


def adapted(kind: str) -> peft.PeftModel:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **KINDS[kind]})
    model = peft.get_peft_model(random_qwen2(), config)
    disturb(model)
    return model.train()


def disturb(model: torch.nn.Module) -> None:
    """Randomize B. It starts at zero, where A has no gradient."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def step(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    loss = CrossEntropy(model)(batch)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    """Assert that every gradient is within `relative` of the largest value of its tensor."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        distance = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert distance <= relative, f"{name}: {distance:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_equal_those_of_peft(kind: str, recompute: bool, kernel_calls: Counter[str]):
    batch = build_batch(documents(LENGTHS))
    plain, fused = adapted(kind), adapted(kind)
    fuse_layers(fused)
    if recompute:
        for layer in (m for m in fused.modules() if isinstance(m, FusedDecoderLayer)):
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, checkpointed
    expected, expected_gradients = step(plain, batch)
    assert not kernel_calls
    found, gradients = step(fused, batch)
    projects, mlps = BY_KERNEL.get(kind, (4, 2))
    if not recompute:
        assert kernel_calls == Counter({"project": projects, "swiglu_mlp": mlps, "attend": 2, "rms_norm": 4})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    # fp32 sums over a few hundred tokens in another order.
    check_close(gradients, expected_gradients, 2e-5)


@pytest.mark.parametrize("kind", ["q and v", "all linears", "down alone", "up and o", "dropout", "patterns"])
@pytest.mark.parametrize("tile_rows", [None, 16])
@pytest.mark.parametrize("recompute", [False, True])
def test_with_a_frozen_a_b_has_the_gradients_of_peft(kind: str, tile_rows: int | None, recompute: bool):
    batch, found = build_batch(documents(LENGTHS)), []
    for fused in (False, True):
        model = adapted(kind).double()
        freeze_a(model)
        if fused:
            fuse_layers(model)
        for layer in (m for m in model.modules() if isinstance(m, FusedDecoderLayer)):
            layer.mlp_tile_rows = tile_rows
            if recompute:
                layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, checkpointed
        found.append(step(model, batch))
    (expected, wanted), (loss, gradients) = found
    assert gradients and not [name for name in gradients if "lora_B" not in name]
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-6)
    check_close(gradients, wanted, 2e-6)  # both compute attention in fp32


def test_switching_the_adapter_off_and_on_keeps_a_frozen():
    model = adapted("q and v")
    freeze_a(model)
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with model.disable_adapter():
        pass
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before
    assert before and all("lora_B" in name for name in before)


def checkpointed(function, *inputs):
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)


@pytest.mark.parametrize("kind", ["q and v", "all linears", "down alone"])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_mlp_in_tiles_has_the_gradients_of_a_whole_one(kind: str, recompute: bool, monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []
    real = linear.swiglu_forward
    monkeypatch.setattr(linear, "swiglu_forward", lambda gate, up: (rows.append(len(gate)), real(gate, up))[1])
    monkeypatch.setattr(linear, "MLP_TILES", 1000)  # the tiles of a long pack
    batch, gradients, computed = build_batch(documents(LENGTHS)), [], []
    for tile_rows in (None, 16):
        model = adapted(kind)
        fuse_layers(model)
        for layer in (m for m in model.modules() if isinstance(m, FusedDecoderLayer)):
            layer.mlp_tile_rows = tile_rows
            if recompute:
                layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, checkpointed
        rows.clear()
        gradients.append(step(model, batch)[1])
        computed.append(sum(rows))
    assert max(rows) == 16
    check_close(gradients[1], gradients[0], 1e-5)
    if kind == "q and v" and recompute:  # up to the input of the MLP, not the MLP
        assert computed[1] < computed[0]


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("storage", ["nf4", "resident", "int8", "none"])
def test_a_quantized_base_in_bf16_is_as_close_to_fp32_as_peft(tmp_path: Path, storage: str, targets: Any):
    """No reference is exact: fused layers may be at most 25 % further from fp32 arithmetic than PEFT."""
    random_qwen2(dtype=torch.bfloat16).save_pretrained(tmp_path)
    quant_type = "nf4" if storage == "resident" else storage
    lora = LoraConfig(rank=4, target_modules=targets)

    def model(dtype: str, fused: bool) -> torch.nn.Module:
        quant = QuantConfig(type=quant_type, compute_dtype=dtype, cache=False, keep_dequantized=storage == "resident")
        found = attach_lora(load_base(ModelConfig(name=str(tmp_path), dtype=dtype), quant, "cpu"), lora)
        disturb(found)
        if fused:
            fuse_layers(found)
        return found.train()

    batch = build_batch(documents(LENGTHS))
    _, exact = step(model("float32", False), batch)
    _, peers = step(model("bfloat16", False), batch)
    _, ours = step(model("bfloat16", True), batch)

    def distance(gradients: dict[str, torch.Tensor]) -> float:
        squares = [((g - exact[n]).square().sum() / exact[n].square().sum()).item() for n, g in gradients.items()]
        return (sum(squares) / len(squares)) ** 0.5

    assert distance(ours) <= 1.25 * distance(peers) + 1e-6


def test_sharing_prefixes_and_skipping_tokens_after_the_last_target_changes_no_gradient(kernel_calls: Counter[str]):
    shared = documents([90])[0]
    docs = []
    for common, document in zip((90, 40, 40, 0, 90, 12), documents([130, 60, 41, 33, 90, 70], seed=3), strict=True):
        ids, labels = document.ids.copy(), document.labels.copy()
        ids[:common], labels[:common] = shared.ids[:common], shared.labels[:common]
        docs.append(type(document)(ids, labels, document.location))
        docs[-1].labels[len(docs[-1]) - 5 * len(docs) :] = IGNORE_INDEX  # a tail that no target needs
    apart, together = build_batch(docs), build_batch(docs, share_prefixes=True)
    assert apart.rows == apart.tokens > together.tokens and together.rows < 0.6 * together.tokens
    for kind in ("q and v", "all linears"):
        model = adapted(kind)
        fuse_layers(model)
        expected, expected_gradients = step(model, apart)
        found, gradients = step(model, together)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        check_close(gradients, expected_gradients, 2e-5)
        torch.testing.assert_close(score(model, together).nll, score(model, apart).nll, rtol=1e-5, atol=1e-4)


def test_a_second_backward_pass_is_an_error():
    model = adapted("q and v")
    fuse_layers(model)
    loss = CrossEntropy(model)(build_batch(documents(LENGTHS)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_layers_of_an_unknown_class_stay_and_are_reported():
    config = Phi3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    other = Phi3ForCausalLM(config)
    assert fuse_layers(other) == FusedLayers(0, 1, {"model.layers.0": "no kernels for Phi3DecoderLayer"})
    assert type(other.model.layers[0]) is Phi3DecoderLayer
    mixed = random_qwen2().requires_grad_(False)
    mixed.model.layers.append(Phi3DecoderLayer(config, 2))
    assert fuse_layers(mixed) == FusedLayers(2, 3, {"model.layers.2": "no kernels for Phi3DecoderLayer"})


def test_the_model_stays_an_ordinary_peft_model(tmp_path: Path, kernel_calls: Counter[str]):
    plain, fused = adapted("q and v"), adapted("q and v")
    assert fuse_layers(fused) == fuse_layers(fused) == FusedLayers(2, 2, {})
    assert fused.state_dict().keys() == plain.state_dict().keys()
    ids = torch.arange(24).reshape(2, 12)
    for mode in ("eval", "train"):
        getattr(plain, mode)(), getattr(fused, mode)()
        torch.testing.assert_close(fused(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert kernel_calls == {"project": 8, "swiglu_mlp": 4, "rms_norm": 8}  # no segments: attention of transformers
    kernel_calls.clear()
    plain.eval(), fused.eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fused.generate(input_ids=ids, **options), plain.generate(input_ids=ids, **options))
    assert kernel_calls["swiglu_mlp"] == 2 * 5
    save_adapter(fused, tmp_path)
    check_adapter(tmp_path, fused)
    reloaded = peft.PeftModel.from_pretrained(random_qwen2(), str(tmp_path))
    assert torch.equal(reloaded(input_ids=ids).logits, plain(input_ids=ids).logits)
    merged, expected = fused.merge_and_unload(), plain.merge_and_unload()
    assert all(map(torch.equal, merged.state_dict().values(), expected.state_dict().values()))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "segmented"])
def test_generation_from_padded_prompts_equals_peft(kind: str, attention: str, kernel_calls):
    prompts, logits = [[7, 8, 9], [11] * 40, [3, 60, 2]], {False: [], True: []}
    for is_fused, seen in logits.items():
        model = adapted(kind).eval()
        model.config._attn_implementation = attention
        if is_fused:
            assert not kernel_calls
            fuse_layers(model)

        def choose(logits_NV: torch.Tensor, *_: Any, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(logits_NV.clone())
            return torch.arange(len(logits_NV)) + len(seen)  # fixed, so that both models read the same tokens

        decode(model, prompts_of(prompts), [4, 4, 2], choose, stop_ids=frozenset(), vocabulary=97)
    projects, mlps = BY_KERNEL.get(kind, (4, 2))
    assert kernel_calls == Counter({"project": 4 * projects, "swiglu_mlp": 4 * mlps, "rms_norm": 4 * 4}) - Counter()
    assert [len(step) for step in logits[True]] == [3, 3, 2, 2]
    for found, expected in zip(logits[True], logits[False], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_disabled_merged_and_multiple_adapters_equal_peft():
    batch = build_batch(documents(LENGTHS))
    plain, fused = adapted("q and v"), adapted("q and v")
    fuse_layers(fused)

    def nats(model: torch.nn.Module) -> torch.Tensor:
        return score(model, batch).nll

    with plain.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(nats(fused), nats(plain), rtol=1e-5, atol=1e-4)
    assert abs(nats(fused) - nats(random_qwen2())) > 1
    for model in (plain, fused):
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "other" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(nats(fused), nats(plain), rtol=1e-5, atol=1e-4)
    for model in (plain, fused):
        model.merge_adapter()
    torch.testing.assert_close(nats(fused), nats(plain), rtol=1e-5, atol=1e-4)
