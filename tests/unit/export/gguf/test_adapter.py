from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.export.gguf.architecture import linear_name
from finetune.export.gguf.check import llama_logits, open_llama
from finetune.export.gguf.model import write as to_gguf
from finetune.models.families import FAMILIES
from finetune.system.errors import ConfigError, IntegrityError
from tests.unit.export.gguf.models import request

gguf = pytest.importorskip("gguf", reason="needs the export extra")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": LINEAR},
    "rslora": {"r": 6, "lora_alpha": 16, "target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "r": 8,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 4},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
    },
    "no scale": {"r": 8, "lora_alpha": 0, "alpha_pattern": {"up_proj": 8}, "target_modules": ["q_proj", "up_proj"]},
}


@pytest.fixture
def tiny(repo_root: Path) -> Path:
    return repo_root / "data" / "tiny-qwen2.5"


def save_adapter(base: Path, folder: Path, **config: Any) -> PeftModel:
    """Save a random fp32 adapter over the base with PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted.eval()


def updates(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """Return PEFT's update of each matrix, by its name in a GGUF file."""
    return {
        f"{linear_name(FAMILIES['qwen2'], name.removeprefix('base_model.model.'))}.weight": module.get_delta_weight(
            "default"
        )
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def file_updates(path: Path) -> dict[str, torch.Tensor]:
    """Return the updates as llama.cpp computes them: alpha / rank * B A, or B A if alpha is 0."""
    reader = gguf.GGUFReader(path)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    data = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in data}
    assert len(data) == 2 * len(names)
    return {
        name: (alpha / len(data[f"{name}.lora_a"]) if alpha else 1) * data[f"{name}.lora_b"] @ data[f"{name}.lora_a"]
        for name in names
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_the_update_of_peft(kind: str, tiny: Path, tmp_path: Path):
    adapted = save_adapter(tiny, tmp_path / "adapter", **KINDS[kind])
    exported = to_gguf(request(tmp_path / "adapter", tmp_path / "out", merge=False))
    wanted, found = updates(adapted), file_updates(tmp_path / "out" / "out-f32.gguf")
    assert found.keys() == wanted.keys() and len(wanted) in (28, 8)
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, rtol=1e-5, atol=1e-6)
    assert any(update.any() for update in wanted.values())
    assert exported.serve == [f"llama-server -m BASE.gguf --lora {tmp_path}/out/out-f32.gguf"]


@pytest.mark.parametrize(
    ("kind", "name", "limit"),
    [*((kind, "f32", 1e-5) for kind in KINDS), ("plain", "bf16", 0.05), ("plain", "q8_0", 0.05)],
)
def test_llama_cpp_computes_what_peft_computes(kind: str, name: str, limit: float, tiny: Path, tmp_path: Path):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    adapted = save_adapter(tiny, tmp_path / "adapter", **KINDS[kind])
    to_gguf(request(tiny, tmp_path / "base", type="f32", verify=False))
    to_gguf(request(tmp_path / "adapter", tmp_path / "out", merge=False, type=name))
    ids = torch.randint(0, 880, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = adapted(ids).logits[0]
        with adapted.disable_adapter():
            before = adapted(ids).logits[0]
    llama = open_llama(tmp_path / "base" / "base-f32.gguf", 40, tmp_path / "out" / f"out-{name}.gguf")
    found = llama_logits(llama, ids[0].tolist())
    assert (found - wanted).abs().mean() < limit * (wanted - before).abs().mean()


def test_the_entries_describe_an_adapter(tiny: Path, tmp_path: Path):
    save_adapter(tiny, tmp_path / "adapter", **KINDS["plain"])
    to_gguf(request(tmp_path / "adapter", tmp_path / "out", merge=False))
    reader = gguf.GGUFReader(tmp_path / "out" / "out-f32.gguf")
    wanted = {
        "general.architecture": "qwen2",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
        "general.base_model.0.name": "tiny-qwen2.5",
    }
    assert {key: reader.get_field(key).contents() for key in wanted} == wanted
    shapes = {tensor.name: tuple(map(int, tensor.shape[::-1])) for tensor in reader.tensors}
    assert (shapes["blk.3.ffn_down.weight.lora_a"], shapes["blk.3.ffn_down.weight.lora_b"]) == ((8, 768), (256, 8))


def test_everything_that_the_file_cannot_hold_is_listed(tiny: Path, tmp_path: Path):
    save_adapter(
        tiny,
        tmp_path / "adapter",
        r=4,
        target_modules=["q_proj", "embed_tokens"],
        use_dora=True,
        bias="lora_only",
        modules_to_save=["norm"],
        trainable_token_indices={"lm_head": [881, 882]},
    )
    with pytest.raises(ConfigError) as caught:
        to_gguf(request(tmp_path / "adapter", tmp_path / "out", merge=False))
    message = str(caught.value)
    for part in (
        "merge=true",
        "use_dora",
        'modules_to_save=["norm"]',
        "trainable_token_indices=",
        "bias=lora_only",
        "embed_tokens",
    ):
        assert part in message
    assert not list((tmp_path / "out").iterdir())


def test_an_adapter_that_needs_other_base_weights_is_refused(tiny: Path, tmp_path: Path):
    save_adapter(tiny, tmp_path / "adapter", **KINDS["plain"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ConfigError, match="init_lora_weights=pissa_niter_4"):
        to_gguf(request(tmp_path / "adapter", tmp_path / "out", merge=False))


def test_corrupt_adapters_and_types_of_models_are_refused(tiny: Path, tmp_path: Path):
    save_adapter(tiny, tmp_path / "adapter", **KINDS["plain"])
    with pytest.raises(ConfigError, match=r"type: .* f32, f16, bf16, q8_0, found q4_0"):
        to_gguf(request(tmp_path / "adapter", tmp_path / "out", merge=False, type="q4_0"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(IntegrityError, match="NaN"):
        to_gguf(request(tmp_path / "adapter", tmp_path / "out", merge=False))
