"""Loading the tokenizer and the base."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.load import load_base
from finetune.models.quant import four_bit
from finetune.models.tokenizer import load_tokenizer
from finetune.system.errors import ConfigError, IntegrityError, MissingExtra, ResourceError

PLAIN = QuantConfig(type="none")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_weight_is_frozen_and_has_the_configured_dtype(load, dtype: Any) -> None:
    model = load("none", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_the_weights_equal_those_of_the_file(load, make_base) -> None:
    tensors = load_file(make_base() / "model.safetensors")
    for name, tensor in load("none").state_dict().items():
        if name != "lm_head.weight":
            assert tensor.equal(tensors[name]), name


def test_a_tied_head_shares_the_embedding(load) -> None:
    tied, untied = load("nf4", tied=True), load("nf4", tied=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize(("asked", "given"), [("auto", "segmented"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_the_config_chooses_the_attention_kernel(make_base, asked: Any, given: str) -> None:
    model = load_base(ModelConfig(name=str(make_base()), attention=asked), PLAIN, device="cpu")
    assert model.config._attn_implementation == given


def test_the_attention_kernel_changes_only_rounding(make_base) -> None:
    ids = torch.arange(30)[None] * 7 % 300
    logits = [
        load_base(ModelConfig(name=str(make_base()), attention=kind, dtype="float32"), PLAIN, device="cpu")(ids).logits
        for kind in ("auto", "eager")
    ]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)


def test_a_missing_flash_attention_is_an_error_with_the_command(make_base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(MissingExtra, match="pip install flash-attn"):
        load_base(ModelConfig(name=str(make_base()), attention="flash_attention_2"), PLAIN, device="cpu")


def test_generate_works_and_uses_its_cache(load) -> None:
    model = load("nf4")
    answer = model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False)
    assert answer.shape[1] <= 9
    assert model.config.use_cache


def test_loading_prints_nothing(make_base) -> None:
    script = (
        "import sys; from finetune import attach_lora, load_base\n"
        "from finetune.config.schema import ModelConfig, QuantConfig, LoraConfig\n"
        "model = attach_lora(load_base(ModelConfig(name=sys.argv[1]), QuantConfig(), 'cpu'), LoraConfig())\n"
        "import torch; model(torch.arange(4)[None])"
    )
    run = subprocess.run([sys.executable, "-c", script, str(make_base())], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_weights_of_another_model_are_an_error(make_base, tmp_path: Path, quant_type: Any) -> None:
    folder = Path(shutil.copytree(make_base(), tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(128, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError) as error:
        load_base(ModelConfig(name=str(folder)), QuantConfig(type=quant_type), device="cpu")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        assert name in str(error.value)


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_a_tensor_of_another_shape_is_an_error(make_base, tmp_path: Path, quant_type: Any) -> None:
    folder = Path(shutil.copytree(make_base(), tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight"):
        load_base(ModelConfig(name=str(folder)), QuantConfig(type=quant_type), device="cpu")


def test_a_missing_head_is_an_error(make_base, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_base(tied=False), tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"lm_head\.weight"):
        load_base(ModelConfig(name=str(folder)), PLAIN, device="cpu")


def test_all_unknown_modules_are_reported_together(make_base) -> None:
    with pytest.raises(ConfigError) as error:
        load_base(ModelConfig(name=str(make_base())), QuantConfig(skip_modules=["upproj", "attn.9"]), device="cpu")
    assert "'upproj' matches no linear layer; did you mean up_proj" in str(error.value)
    assert "'attn.9'" in str(error.value)


@pytest.mark.parametrize(
    ("raised", "expected", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ResourceError, "GPU memory with quant.type=nf4"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ResourceError, "main memory"),
        (RuntimeError("Native code method attempted to call: bitsandbytes"), MissingExtra, "pip install --upgrade"),
        (RuntimeError("something else"), RuntimeError, "something else"),
    ],
)
def test_a_failure_while_loading_is_an_error_with_its_cause(
    make_base, monkeypatch, raised: Exception, expected: type, says: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise raised

    for place, name in ((four_bit, "quantize"), (PreTrainedModel, "from_pretrained")):
        monkeypatch.setattr(place, name, fail)
    for quant_type in ("nf4", "none"):
        with pytest.raises(expected, match=says.replace("nf4", quant_type)):
            load_base(ModelConfig(name=str(make_base())), QuantConfig(type=quant_type, cache=False), device="cpu")


def test_without_bitsandbytes_the_error_gives_the_command(make_base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r'pip install "bitsandbytes'):
        load_base(ModelConfig(name=str(make_base())), QuantConfig(), device="cpu")


def test_a_loaded_tokenizer_equals_the_saved_one(tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(name=str(tmp_path)))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.chat_template, loaded.name_or_path) == ("{{ messages }}", str(tmp_path))


def test_the_tokenizer_of_qwen_has_its_ids_and_template(shared: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(name=str(shared / "qwen2.5" / "tokenizer")))
    assert len(tokenizer) == 151665
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 151645
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )


def test_a_tokenizer_with_code_or_without_files_is_an_error(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    with pytest.raises(ConfigError, match="names code to run"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))
    file.unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer_config\.json"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))
