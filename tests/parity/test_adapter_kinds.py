"""Every kind of adapter, trained, saved and reloaded by PEFT, equals float64 and PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.files import check_adapter, save_adapter
from finetune.models.adapters.inits import lora_layers
from finetune.models.load import load_base
from finetune.models.tokenizer import quiet
from tests.models import save_tiny_base

Load = Callable[..., PreTrainedModel]
IDS = torch.arange(40).reshape(2, 20) * 7 % 300
IDS[:, 5], IDS[:, 11] = 300, 301  # the new tokens, where there are any; spare rows elsewhere

KINDS: dict[str, dict[str, Any]] = {
    "q and v": {},
    "all-linear": {"target_modules": "all-linear"},
    "one regex": {"target_modules": r".*layers\.1\..*(q|down)_proj"},
    "layers_to_transform": {"target_modules": "all-linear", "layers_to_transform": [1]},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.1\..*v_proj": 3.5}},
    "rslora": {"rslora": True},
    "dora": {"dora": True, "target_modules": "all-linear"},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "norm saved": {"modules_to_save": ["norm"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "new tokens": {"new_tokens": ["<call>", "<done>"]},
    "dora with dropout": {"dora": True, "dropout": 0.1, "rslora": True},
}
FOUR_BIT_KINDS: dict[str, dict[str, Any]] = {
    "loftq": {"init": "loftq"},
    "loftq with dora": {"init": "loftq", "dora": True},
}
BASE_CHANGING_KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "randomized pissa": {"init": "pissa_niter_16", "target_modules": "all-linear"},
    "olora with rslora and patterns": {"init": "olora", "rslora": True, "rank_pattern": {"q_proj": 4}},
    "pissa with dora": {"init": "pissa", "dora": True, "alpha_pattern": {"q_proj": 3.0}},
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """`load(quant_type, tied, dtype)`: a fresh random two-layer Qwen2."""
    folders = {tied: save_tiny_base(tmp_path_factory.mktemp("base"), tied) for tied in (True, False)}

    def load_tiny(quant_type: Any, tied: bool = True, dtype: Any = "bfloat16") -> PreTrainedModel:
        name = ModelConfig(name=str(folders[tied]), dtype=dtype)
        return load_base(name, QuantConfig(type=quant_type, compute_dtype=dtype), device="cpu")

    return load_tiny


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 300 words."""
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(300)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model: peft.PeftModel) -> None:
    """Take two SGD steps; every trainable tensor must get a gradient."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def trained_and_reloaded(load: Callable[[], PreTrainedModel], cfg: LoraConfig, tokenizer, folder: Path) -> tuple:
    """Return logits before and after training, and of the saved folder loaded by PEFT on a fresh base."""
    torch.manual_seed(1)
    model = attach_lora(load(), cfg, tokenizer)
    before = logits(model)
    train(model)
    save_adapter(model, folder)
    check_adapter(folder, model)
    with quiet():
        reloaded = peft.PeftModel.from_pretrained(load(), str(folder))
    return before, logits(model), logits(reloaded)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
class TestReloaded:
    """PeftModel.from_pretrained(base, folder) equals the trained model."""

    @pytest.mark.parametrize("settings", (KINDS | FOUR_BIT_KINDS).values(), ids=KINDS | FOUR_BIT_KINDS)
    def test_on_a_4bit_base_bit_for_bit(self, load: Load, tokenizer, tmp_path: Path, settings: dict[str, Any]) -> None:
        cfg = LoraConfig(**settings)
        before, after, reloaded = trained_and_reloaded(lambda: load("nf4"), cfg, tokenizer, tmp_path)
        assert not after.equal(before)
        assert reloaded.equal(after)

    @pytest.mark.parametrize("kind", ["embedding saved", "head saved", "both saved", "new tokens"])
    def test_on_a_base_with_a_head_of_its_own(self, load: Load, tokenizer, tmp_path: Path, kind: str) -> None:
        cfg = LoraConfig(**KINDS[kind])
        before, after, reloaded = trained_and_reloaded(lambda: load("nf4", tied=False), cfg, tokenizer, tmp_path)
        assert not after.equal(before)
        assert reloaded.equal(after)

    @pytest.mark.parametrize("quant_type", ["int8", "none"])
    @pytest.mark.parametrize("kind", ["all-linear", "patterns", "head saved", "new tokens"])
    def test_on_other_bases_bit_for_bit(
        self, load: Load, tokenizer, tmp_path: Path, quant_type: Any, kind: str
    ) -> None:
        cfg = LoraConfig(**KINDS[kind])
        before, after, reloaded = trained_and_reloaded(lambda: load(quant_type), cfg, tokenizer, tmp_path)
        assert not after.equal(before)
        assert reloaded.equal(after)

    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
    @pytest.mark.parametrize("settings", BASE_CHANGING_KINDS.values(), ids=BASE_CHANGING_KINDS)
    def test_on_the_original_base_of_pissa_and_olora(
        self, load: Load, tokenizer, tmp_path: Path, settings: dict[str, Any], dtype: Any, tolerance: float
    ) -> None:
        """The residual base is rounded to its dtype, the original is not: they differ by one rounding."""
        cfg = LoraConfig(**settings)
        before, after, reloaded = trained_and_reloaded(lambda: load("none", True, dtype), cfg, tokenizer, tmp_path)
        torch.testing.assert_close(reloaded, after, rtol=0, atol=tolerance)
        assert (after - before).abs().max() > 5 * tolerance


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_values_and_gradients_of_a_layer_equal_float64(load: Load, quant_type: Any, rslora: bool) -> None:
    """y = W x + b + s B A x and its gradients, W dequantized. An fp32 model leaves only rounding."""
    torch.manual_seed(2)
    cfg = LoraConfig(rank=4, alpha=6.0, rslora=rslora)
    adapted: dict[str, Any] = dict(lora_layers(attach_lora(load(quant_type, dtype="float32"), cfg)))
    layer = adapted["model.layers.0.self_attn.q_proj"]
    base, factor_A, factor_B = layer.get_base_layer(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        factor_B.normal_()
    stored = (
        base.weight
        if quant_type == "none"
        else bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    )
    x: Any = torch.randn(2, 5, 64).requires_grad_()
    upstream = torch.randn(2, 5, 64)
    exact_x, exact_A, exact_B = (tensor.detach().double().requires_grad_() for tensor in (x, factor_A, factor_B))
    scaling = 6.0 / (2.0 if rslora else 4.0)
    exact = exact_x @ stored.double().T + base.bias.double() + scaling * exact_x @ exact_A.T @ exact_B.T
    exact.backward(upstream.double())
    y = layer(x)
    y.backward(upstream)
    for found, expected in (
        (y, exact),
        (x.grad, exact_x.grad),
        (factor_A.grad, exact_A.grad),
        (factor_B.grad, exact_B.grad),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora", "orthogonal"])
def test_inits_equal_those_of_peft(load: Load, init: Any) -> None:
    """On an fp32 base, where PEFT is exact: the same factors and the same residual base."""
    theirs = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=True if init == "default" else init,
    )
    torch.manual_seed(3)
    expected = peft.get_peft_model(load("none", dtype="float32"), theirs)
    torch.manual_seed(3)
    cfg = LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"], init=init)
    found = attach_lora(load("none", dtype="float32"), cfg)
    pairs: list[dict[str, Any]] = [dict(lora_layers(model)) for model in (found, expected)]
    for name in pairs[0]:
        ours, peers = pairs[0][name], pairs[1][name]
        if init != "orthogonal":  # random: drawn after another number of draws
            torch.testing.assert_close(ours.lora_A["default"].weight, peers.lora_A["default"].weight)
            torch.testing.assert_close(ours.lora_B["default"].weight, peers.lora_B["default"].weight)
        torch.testing.assert_close(ours.get_base_layer().weight, peers.get_base_layer().weight)
        assert ours.scaling == peers.scaling


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_step_is_bit_identical_to_peft(load: Load, tokenizer) -> None:
    """attach_lora and load_base equal transformers and PEFT on the same 4-bit weights."""
    torch.manual_seed(4)
    ours = attach_lora(load("nf4"), LoraConfig(rank=4, target_modules="all-linear"), copy.deepcopy(tokenizer))
    torch.manual_seed(4)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear")
    peers = peft.get_peft_model(load("nf4"), config)
    train(ours)
    train(peers)
    found = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    expected = {name: parameter for name, parameter in peers.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
