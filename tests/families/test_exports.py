"""Files for other programs compute what the model computes, for each family that their format has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import QuantConfig
from finetune.export.adapter_folder import write as to_adapter
from finetune.export.gguf.model import write as to_gguf
from finetune.export.onnx.model import write as to_onnx
from finetune.export.safetensors_folder import write as to_folder
from finetune.export.verify import open_model
from finetune.models.families import FAMILIES
from finetune.models.families.proven import PROVEN
from finetune.models.load import load_base
from finetune.system.errors import ConfigError
from tests.families.tiny import CPU, TinyFamily, save
from tests.unit.export.gguf.models import request

Get = Callable[[str], TinyFamily]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    gguf = pytest.importorskip("gguf", reason="needs the export extra")
    found = gguf.GGUFReader(path).tensors
    return {each.name: torch.tensor(gguf.dequantize(each.data, each.tensor_type)) for each in found}


def entries(path: Path) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf", reason="needs the export extra")
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", PROVEN["GGUF"])
def test_a_gguf_file_is_read_back_with_the_logits_of_its_source(name: str, tiny: Get, tmp_path: Path):
    pytest.importorskip("gguf", reason="needs the export extra")
    exported = to_gguf(request(tiny(name).folder, tmp_path / "out", type="f32"))
    assert exported.checks and all(check.same == 1 and check.largest < 1e-4 for check in exported.checks)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("qwen3", {"qwen3.attention.key_length": 32, "tokenizer.ggml.pre": "qwen2"}),
        (
            "llama",
            {"llama.rope.dimension_count": 16, "tokenizer.ggml.pre": "llama-bpe"},
        ),
        ("mistral", {"llama.attention.value_length": 32, "tokenizer.ggml.model": "llama", "rope_freqs": None}),
    ],
)
def test_the_entries_are_those_of_llama_cpp(name: str, wanted: dict[str, Any], tiny: Get, tmp_path: Path):
    to_gguf(request(tiny(name).folder, tmp_path / "out", type="f32", verify=False))
    path = tmp_path / "out" / "out-f32.gguf"
    found = entries(path)
    assert {key: found.get(key) for key in wanted} == wanted
    assert found["general.architecture"] == FAMILIES[name].gguf.architecture
    weights = tensors(path)
    assert ("blk.0.attn_q_norm.weight" in weights) == (name == "qwen3")
    assert ("rope_freqs.weight" in weights) == (name == "llama")


def test_frequencies_that_llama_does_not_scale_keep_their_value(tiny: Get, tmp_path: Path):
    to_gguf(request(tiny("llama").folder, tmp_path / "out", type="q8_0", verify=False))
    factors = tensors(tmp_path / "out" / "out-q8_0.gguf")["rope_freqs.weight"]
    assert factors[0] == 1 and factors[-1] == 4 and (factors.diff() >= 0).all()


@pytest.mark.parametrize("name", PROVEN["GGUF"])
def test_an_adapter_in_gguf_is_the_update_of_the_merged_matrix(name: str, tiny: Get, tmp_path: Path):
    """llama.cpp adds scale * B A to its own weight: the rows of B must be in the order of that weight."""
    trained = tiny(name).adapted(tiny(name).stock())
    trained.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    trained.merge_and_unload().save_pretrained(merged)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (merged / file).write_bytes((tiny(name).folder / file).read_bytes())
    files = {}
    for part, source in (("base", tiny(name).folder), ("merged", merged)):
        to_gguf(request(source, tmp_path / f"out-{part}", out="m", type="f32", verify=False))
        files[part] = tensors(tmp_path / f"out-{part}" / "m-f32.gguf")
    to_gguf(request(tmp_path / "adapter", tmp_path / "lora", out="m", merge=False))
    factors = tensors(tmp_path / "lora" / "m-f32.gguf")
    assert len(factors) == 2 * 2 * 7
    for matrix in {key.rpartition(".")[0] for key in factors}:
        update = 2 * factors[f"{matrix}.lora_b"] @ factors[f"{matrix}.lora_a"]
        torch.testing.assert_close(update, files["merged"][matrix] - files["base"][matrix], rtol=1e-4, atol=1e-5)
        assert update.any()


def test_nemo_has_the_rules_of_tekken(tmp_path: Path):
    pytest.importorskip("gguf", reason="needs the export extra")
    model = save("mistral", tmp_path / "nemo", "mistral-nemo")
    exported = to_gguf(request(model.folder, tmp_path / "out", type="f32"))
    assert all(check.same == 1 for check in exported.checks)
    assert entries(tmp_path / "out" / "out-f32.gguf")["tokenizer.ggml.pre"] == "tekken"


@pytest.mark.parametrize("change", ["first", "window"])
def test_what_llama_cpp_computes_otherwise_is_refused(change: str, tmp_path: Path):
    pytest.importorskip("gguf", reason="needs the export extra")
    window = {"sliding_window": 64} if change == "window" else {}
    model = save("mistral", tmp_path / "model", **window)
    says = "sliding_window 64"
    if change == "first":
        says = "a space before the text after every special token"
        file = model.folder / "tokenizer.json"
        content = json.loads(file.read_text())
        space = content["normalizer"]["normalizers"][0]["prepend"]
        content["normalizer"] = None
        content["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": space,
            "prepend_scheme": "first",
            "split": False,
        }
        file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=re.escape(says)):
        to_gguf(request(model.folder, tmp_path / "out", type="f32"))


@pytest.mark.parametrize("name", PROVEN["servers"])
def test_folders_for_servers_are_read_back(name: str, tiny: Get, tmp_path: Path):
    source = tiny(name).folder
    exported = to_folder(request(source, tmp_path / "fp32", format="safetensors", type="fp32"))
    assert [(check.same, check.largest) for check in exported.checks] == [(1, 0)]
    # The top tokens of a random model do not survive rounding to 4 bits, its bits are those of training.
    to_folder(request(source, tmp_path / "nf4", format="safetensors", type="nf4", verify=False))
    opened = open_model(tmp_path / "nf4")
    in_4_bit = {key for key, module in opened.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(in_4_bit) == 2 * 7 and all(key.startswith(FAMILIES[name].decoder) for key in in_4_bit)
    found = opened.state_dict()
    wanted = load_base(tiny(name).config(dtype="bfloat16"), QuantConfig(), CPU).state_dict()
    packed = [key for key, tensor in wanted.items() if tensor.dtype == torch.uint8 and key.endswith(".weight")]
    assert len(packed) == 2 * 7 and all(torch.equal(found[key], wanted[key]) for key in packed)
    base = tiny(name).stock()
    base.name_or_path = base.config.name_or_path = str(source)
    tiny(name).adapted(base).save_pretrained(tmp_path / "adapter")
    exported = to_adapter(request(tmp_path / "adapter", tmp_path / "served", format="adapter"))
    assert [(check.same, check.largest) for check in exported.checks] == [(1, 0)]


@pytest.mark.parametrize("name", PROVEN["ONNX"])
def test_an_onnx_graph_computes_the_logits_of_its_source(name: str, tiny: Get, tmp_path: Path):
    pytest.importorskip("onnxruntime_genai", reason="needs the export extra")
    exported = to_onnx(request(tiny(name).folder, tmp_path / "out", format="onnx", type="fp32"))
    assert exported.checks and all(check.same == 1 for check in exported.checks), exported.checks
