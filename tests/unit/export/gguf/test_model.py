from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.config.command_options import ExportOptions
from finetune.export.export import export_model
from finetune.export.gguf import architecture
from finetune.export.gguf import file as gguf_file
from finetune.export.gguf.check import llama_logits, open_llama
from finetune.export.gguf.model import write as to_gguf
from finetune.export.gguf.types import TYPES
from finetune.system.errors import ConfigError, IntegrityError, MissingExtra
from tests.unit.export.gguf.models import request, save_model

gguf = pytest.importorskip("gguf", reason="needs the export extra")

ENDS = [880, 882]
PROMPT = [{"role": "user", "content": "Write the numbers 3, 1 and 2 in rising order."}]


@pytest.fixture
def tiny(repo_root: Path) -> Path:
    return repo_root / "data" / "tiny-qwen2.5"


def entry(path: Path, key: str) -> Any:
    field = gguf.GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, tensor in changes.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, file, metadata={"format": "pt"})


def answers_of_64(tiny: Path) -> tuple[list[int], list[int]]:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tiny).apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True)
    return ids["input_ids"], greedy(model, ids["input_ids"])


def greedy(model: Any, ids: list[int]) -> list[int]:
    # Past the end of the answer, so that there are 64 of them.
    out = model.generate(torch.tensor([ids]), max_new_tokens=64, suppress_tokens=ENDS, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_f32_generates_the_64_tokens_of_its_source(tiny: Path, tmp_path: Path):
    exported = to_gguf(request(tiny, tmp_path / "out", type="f32"))
    assert exported.checks[0].same == 1 and exported.checks[0].largest == 0
    ids, wanted = answers_of_64(tiny)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="out-f32.gguf", dtype=torch.float32)
    assert greedy(model, ids) == wanted and len(wanted) == 64


def test_llama_cpp_has_the_same_64_top_tokens(tiny: Path, tmp_path: Path):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    to_gguf(request(tiny, tmp_path / "out", type="f32", verify=False))
    ids, wanted = answers_of_64(tiny)
    logits = llama_logits(open_llama(tmp_path / "out" / "out-f32.gguf", 256), ids + wanted)
    logits[:, ENDS] = -torch.inf
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == wanted


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_written_and_computes_nearly_the_same(name: str, tiny: Path, tmp_path: Path):
    exported = to_gguf(request(tiny, tmp_path / "out", type=name, tokens=16))
    assert all(check.same >= 0.8 for check in exported.checks), exported.checks
    found = tensors(tmp_path / "out" / f"out-{name}.gguf")
    assert found["blk.0.ffn_up.weight"].tensor_type.name.lower() == name
    assert found["blk.0.attn_q.bias"].tensor_type.name == found["output_norm.weight"].tensor_type.name == "F32"
    small = TYPES[name].small
    assert found["token_embd.weight"].tensor_type.name.lower() == ("q8_0" if small else name)
    assert exported.notes["wider"] == (["token_embd.weight"] if small else [])


def test_the_default_type_is_q8_0_and_commands_name_the_final_folder(tiny: Path, tmp_path: Path):
    (tmp_path / "temporary").mkdir()
    one = request(tiny, tmp_path / "temporary", out=f"{tmp_path}/my model", verify=False)
    exported = to_gguf(one)
    assert [path.name for path in one.out.iterdir()] == ["my-model-q8_0.gguf"]
    assert exported.serve[0] == f"llama-server -m '{tmp_path}/my model/my-model-q8_0.gguf'"


@pytest.mark.parametrize("options", [{}, {"merge": False}])
def test_a_missing_package_is_reported_first(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r'pip install "finetune-qlora\[export\]"'):
        export_model(ExportOptions(adapter=str(tmp_path / "nothing there"), format="gguf", out="x", **options))


def test_the_entries_describe_the_model(tiny: Path, tmp_path: Path):
    to_gguf(request(tiny, tmp_path / "out", type="bf16"))
    path = tmp_path / "out" / "out-bf16.gguf"
    wanted = {
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "out",
        "general.file_type": 32,
        "qwen2.block_count": 4,
        "qwen2.context_length": 4096,
        "qwen2.embedding_length": 256,
        "qwen2.feed_forward_length": 768,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 10000.0,
        "qwen2.rope.dimension_count": 64,
        "qwen2.vocab_size": 896,
        "qwen2.rope.scaling.type": None,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
    }
    assert {key: entry(path, key) for key in wanted} == wanted
    assert entry(path, "qwen2.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_and_untied_heads(tied: bool, dtype: torch.dtype, tiny: Path, tmp_path: Path):
    source = save_model(tmp_path / "source", tiny, dtype, tie_word_embeddings=tied)
    exported = to_gguf(request(source, tmp_path / "out", type="f32"))
    assert ("output.weight" in tensors(tmp_path / "out" / "out-f32.gguf")) is not tied
    assert all(check.same == 1 and check.largest < 1e-3 for check in exported.checks)


def test_a_stored_tied_head_must_equal_the_embedding(tiny: Path, tmp_path: Path):
    source = save_model(tmp_path / "source", tiny)
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    change(source, **{"lm_head.weight": embedding.clone()})
    to_gguf(request(source, tmp_path / "out", type="f32"))
    change(source, **{"lm_head.weight": embedding + 1})
    with pytest.raises(IntegrityError, match=r"lm_head\.weight.*tie_word_embeddings"):
        to_gguf(request(source, tmp_path / "other", type="f32"))


def test_shards_and_small_chunks_write_the_same_file(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = save_model(tmp_path / "whole", tiny)
    shards = save_model(tmp_path / "shards", tiny, shard="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    for name in ("f32", "q8_0"):
        to_gguf(request(whole, tmp_path / f"one-{name}", out="model", type=name, verify=False))
        with monkeypatch.context() as patch:
            patch.setattr(gguf_file, "_CHUNK_VALUES", 300)
            to_gguf(request(shards, tmp_path / f"two-{name}", out="model", type=name))
        one, two = (tmp_path / f"{number}-{name}" / f"model-{name}.gguf" for number in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("shape", [(1000, 896), (3, 2**23), (5,), (2**23 + 1,)])
def test_a_chunk_has_at_most_16_mib_unless_one_row_has_more(shape: tuple[int, ...]):
    planned = gguf_file.PlannedTensor("w", "w", shape, TYPES["f32"], lambda start, stop: torch.empty(0))
    pieces = list(planned.chunks())
    assert [row for start, stop in pieces for row in (start, stop)] == [
        0,
        *(x for _, x in pieces[:-1] for _ in "ab"),
        shape[0],
    ]
    numbers_in_row = torch.Size(shape[1:]).numel()
    assert all((stop - start) * numbers_in_row <= max(2**22, numbers_in_row) for start, stop in pieces)


def test_rows_that_blocks_do_not_fill_are_f16_and_listed(tiny: Path, tmp_path: Path):
    source = save_model(tmp_path / "source", tiny, hidden_size=48)
    logged: list[str] = []
    exported = to_gguf(request(source, tmp_path / "out", logged, type="q8_0"))
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path / "out" / "out-q8_0.gguf").items()}
    assert kinds["blk.1.attn_q.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.1.ffn_down.weight"] == "Q8_0"  # 96 columns
    assert len(exported.notes["wider"]) == 13
    assert any("wider than q8_0" in line for line in logged)


@pytest.mark.parametrize("rope_type", ["yarn", "linear"])
def test_rope_scaling_is_kept(rope_type: str, tiny: Path, tmp_path: Path):
    rope: dict[str, Any] = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0}
    if rope_type == "yarn":
        rope["original_max_position_embeddings"] = 32
    source = save_model(tmp_path / "source", tiny, rope_parameters=rope, max_position_embeddings=128)
    exported = to_gguf(request(source, tmp_path / "out", type="f32", tokens=64))
    assert all(check.largest < 1e-3 for check in exported.checks), exported.checks
    path = tmp_path / "out" / "out-f32.gguf"
    assert entry(path, "qwen2.rope.scaling.type") == rope_type and entry(path, "qwen2.rope.scaling.factor") == 4.0
    assert entry(path, "qwen2.rope.scaling.original_context_length") == (32 if rope_type == "yarn" else None)


def test_every_unsupported_setting_is_listed(tiny: Path, tmp_path: Path):
    source = save_model(tmp_path / "source", tiny)
    config = json.loads((source / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2}
    config |= {"hidden_act": "gelu"}
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"sliding_window 64, hidden_act 'gelu', rope_type 'dynamic'"):
        to_gguf(request(source, tmp_path / "out", type="f32"))


def test_corrupt_models_are_refused(tiny: Path, tmp_path: Path):
    source = save_model(tmp_path / "source", tiny)
    norm = "model.norm.weight"
    good = load_file(source / "model.safetensors")[norm]
    change(source, **{norm: good * float("nan")})
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight.*NaN"):
        to_gguf(request(source, tmp_path / "nan", type="q8_0"))
    change(source, **{norm: None, "model.extra.weight": good})
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight.*; model\.extra\.weight"):
        to_gguf(request(source, tmp_path / "lacking", type="q8_0"))


def test_a_changed_byte_is_found(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Torn(gguf.GGUFWriter):
        def write_tensor_data(self, tensor, *rest):
            if len(self.tensors[0]) == 10:
                tensor = tensor.copy()
                tensor.flat[77] ^= 0x40
            super().write_tensor_data(tensor, *rest)

    monkeypatch.setattr(gguf, "GGUFWriter", Torn)
    for name in ("f32", "f16", "bf16", "q8_0", "q4_0"):
        with pytest.raises(IntegrityError, match=r"blk\.\d\.\w+\.weight is not model\.layers\.\d"):
            to_gguf(request(tiny, tmp_path / name, type=name))


def test_swapped_tensors_are_found(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    swapped = architecture.LINEAR | {"mlp.gate_proj": "ffn_up", "mlp.up_proj": "ffn_gate"}
    monkeypatch.setattr(architecture, "LINEAR", swapped)
    with pytest.raises(IntegrityError):
        to_gguf(request(tiny, tmp_path / "out", type="f32"))
