"""The fast path against PEFT's own: values and gradients of whole models, for adapters it knows and does not know."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.data.batch import Batch, build_batch
from finetune.data.encoded import IGNORE_INDEX
from finetune.evaluation.decoding import Decoding
from finetune.losses.cross_entropy import CrossEntropy, score
from finetune.models import fused as fast_path
from finetune.models.adapters.attach import attach_lora, check_adapter, save_adapter
from finetune.models.fused import FusedDecoderLayer, fuse_layers
from finetune.models.load import load_base
from tests.models import random_qwen2
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
# Of two layers: how many pairs of (q, k, v) and (o) go through `project`, and how many MLPs through `swiglu_mlp`.
BY_KERNEL = {"dora": (2, 0), "saved modules": (4, 0)}


def adapted(kind: str) -> peft.PeftModel:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **KINDS[kind]})
    model = peft.get_peft_model(random_qwen2(), config)
    disturb(model)
    return model.train()


def disturb(model: torch.nn.Module) -> None:
    """B starts at zero, where A has no gradient."""
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
    """Every gradient within `relative` of its tensor's largest value."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        distance = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert distance <= relative, f"{name}: {distance:.1e}"


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel ran."""
    calls: Counter[str] = Counter()
    for name in ("project", "swiglu_mlp", "attend", "rms_norm"):
        real = getattr(fast_path, name)
        monkeypatch.setattr(fast_path, name, lambda *a, real=real, name=name: (calls.update([name]), real(*a))[1])
    return calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_equal_pefts(kind: str, recompute: bool, kernel_calls: Counter[str]):
    batch = build_batch(documents(LENGTHS))
    plain, fast = adapted(kind), adapted(kind)
    fuse_layers(fast)
    if recompute:
        for layer in (m for m in fast.modules() if isinstance(m, FusedDecoderLayer)):
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, checkpointed
    expected, expected_gradients = step(plain, batch)
    assert not kernel_calls
    found, gradients = step(fast, batch)
    projects, mlps = BY_KERNEL.get(kind, (4, 2))
    if not recompute:
        assert kernel_calls == Counter({"project": projects, "swiglu_mlp": mlps, "attend": 2, "rms_norm": 4})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    # fp32 sums over a few hundred tokens in another order.
    check_close(gradients, expected_gradients, 2e-5)


def checkpointed(function, *inputs):
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("storage", ["nf4", "resident", "int8", "none"])
def test_a_quantized_base_in_bf16_is_as_close_to_fp32_as_pefts(tmp_path: Path, storage: str, targets: Any):
    """No reference is exact here: ours may be at most a quarter further from fp32 arithmetic than PEFT's path is."""
    random_qwen2(dtype=torch.bfloat16).save_pretrained(tmp_path)
    quant_type = "nf4" if storage == "resident" else storage
    lora = LoraConfig(rank=4, target_modules=targets)

    def model(dtype: str, fast: bool) -> torch.nn.Module:
        quant = QuantConfig(type=quant_type, compute_dtype=dtype, cache=False, keep_dequantized=storage == "resident")
        found = attach_lora(load_base(ModelConfig(name=str(tmp_path), dtype=dtype), quant, "cpu"), lora)
        disturb(found)
        if fast:
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


def test_what_no_target_needs_and_what_documents_share_changes_nothing_when_left_out(kernel_calls: Counter[str]):
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


def test_a_second_backward_pass_over_overwritten_factors_is_refused():
    model = adapted("q and v")
    fuse_layers(model)
    loss = CrossEntropy(model)(build_batch(documents(LENGTHS)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_model_stays_an_ordinary_peft_model(tmp_path: Path, kernel_calls: Counter[str]):
    plain, fast = adapted("q and v"), adapted("q and v")
    fuse_layers(fast)
    fuse_layers(fast)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    ids = torch.arange(24).reshape(2, 12)
    for mode in ("eval", "train"):
        getattr(plain, mode)(), getattr(fast, mode)()
        assert torch.equal(fast(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not kernel_calls  # none of these gives segments, and autograd is on
    plain.eval(), fast.eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(input_ids=ids, **options), plain.generate(input_ids=ids, **options))
    assert kernel_calls["swiglu_mlp"] == 2 * 5
    save_adapter(fast, tmp_path)
    check_adapter(tmp_path, fast)
    reloaded = peft.PeftModel.from_pretrained(random_qwen2(), str(tmp_path))
    assert torch.equal(reloaded(input_ids=ids).logits, fast(input_ids=ids).logits)
    merged, expected = fast.merge_and_unload(), plain.merge_and_unload()
    assert torch.equal(merged(input_ids=ids).logits, expected(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "segmented"])
def test_padded_rows_are_read_as_peft_reads_them_token_after_token(kind: str, attention: str, kernel_calls):
    prompts, logits = [[7, 8, 9], [11] * 40, [3, 60, 2]], {False: [], True: []}
    for is_fast, seen in logits.items():
        model = adapted(kind).eval()
        model.config._attn_implementation = attention
        if is_fast:
            assert not kernel_calls
            fuse_layers(model)

        def choose(logits_NV: torch.Tensor, *_: Any, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(logits_NV.clone())
            return torch.arange(len(logits_NV)) + len(seen)  # whatever the model says, so that both read the same

        Decoding(model, prompts, [4, 4, 2]).write(choose, frozenset(), 97)
    projects, mlps = BY_KERNEL.get(kind, (4, 2))
    assert kernel_calls == Counter({"project": 4 * projects, "swiglu_mlp": 4 * mlps, "rms_norm": 4 * 4}) - Counter()
    assert [len(step) for step in logits[True]] == [3, 3, 2, 2]
    for found, expected in zip(logits[True], logits[False], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_disabled_adapter_a_merged_one_and_two_at_once_are_what_peft_makes_of_them():
    batch = build_batch(documents(LENGTHS))
    plain, fast = adapted("q and v"), adapted("q and v")
    fuse_layers(fast)

    def nats(model: torch.nn.Module) -> torch.Tensor:
        return score(model, batch).nll

    with plain.disable_adapter(), fast.disable_adapter():
        torch.testing.assert_close(nats(fast), nats(plain), rtol=1e-5, atol=1e-4)
    assert abs(nats(fast) - nats(random_qwen2())) > 1
    for model in (plain, fast):
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "other" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(nats(fast), nats(plain), rtol=1e-5, atol=1e-4)
    for model in (plain, fast):
        model.merge_adapter()
    torch.testing.assert_close(nats(fast), nats(plain), rtol=1e-5, atol=1e-4)
