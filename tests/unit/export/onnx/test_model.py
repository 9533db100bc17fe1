"""An exported ONNX folder computes and stops as its source does, and holds no other files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from finetune.config.command_options import ExportOptions
from finetune.export.exporter import Exported, ExportRequest
from finetune.export.onnx import model as onnx_model
from finetune.export.onnx.builder import build
from finetune.export.onnx.model import TYPES, OnnxModel, settle
from finetune.export.onnx.model import write as to_onnx
from finetune.system.errors import ConfigError, FinetuneError, IntegrityError

EXTRA = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")
NEVER = 895  # a row of the embedded base's vocabulary that no token has
PROMPT = [881, 282, 198, 389, 323, 296, 289, 882, 198, 881, 273, 198]
TEXTS = [
    "Hello world",
    "  spaces,   tabs\t\tand\n\n\nlines  ",
    "Übersetze ins Englische: Guten Morgen, 世界! 👋",
    "हिन्दी, العربية, 한국어, こんにちは、ไทย, İstanbul",
    "I'll don't WE'VE 1234567890 3.14 ½ Ⅷ",
    "def f(x):\n    return {'a': x}\r\n",
    "👩‍👩‍👧‍👦 e\u00e9 \u00a0\u2003\u200b𝒳",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "< |im_start|> <|im_end|><|endoftext|>",
    '<tool_call>\n{"name": "f"}\n</tool_call>',
    "a" * 300,
]
FILES = {
    "chat_template.jinja",
    "genai_config.json",
    "model.onnx",
    "model.onnx.data",
    "run.py",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module", autouse=True)
def _extra() -> None:
    for module in EXTRA:
        pytest.importorskip(module, reason='needs pip install "finetune-qlora[export]"')


@pytest.fixture(scope="module")
def tireless(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base with a stop token that it never generates, so every answer has all tokens."""
    folder = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(repo_root / "data" / "tiny-qwen2.5", folder)
    stops = {"eos_token_id": [NEVER], "pad_token_id": 880, "repetition_penalty": 1.1, "top_k": 7}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    return folder


def request(source: Path, out: Path, kind: str | None, **options) -> ExportRequest:
    out.mkdir(parents=True, exist_ok=True)
    return ExportRequest(
        source, out, ExportOptions(format="onnx", out=str(out), type=kind, **options), lambda line: None
    )


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def exports(tireless: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Exported]]:
    before = digest(tireless)
    made = {}
    for kind in TYPES:
        out = tmp_path_factory.mktemp(kind) / "out"
        made[kind] = (out, to_onnx(request(tireless, out, kind)))
    assert digest(tireless) == before, "the source was written to"
    return made


def test_fp32_generates_the_tokens_of_its_source_with_its_cache(exports) -> None:
    _, exported = exports["fp32"]
    assert exported.notes["generated"] == {"answers": 4, "same_answers": 4, "tokens": 256, "same_tokens": 256}
    assert exported.checks[0].same == 1.0


@pytest.mark.parametrize("kind", TYPES)
def test_each_type_is_near_its_source_and_writes_its_files_only(exports, kind: str) -> None:
    out, exported = exports[kind]
    (check,) = exported.checks
    assert check.tokens == 256
    # A wrong graph is whole nats away.
    assert check.kl < 0.2
    assert {path.name for path in out.iterdir()} == FILES
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(out / "model.onnx").stat().st_mode & 0o777}


def test_fewer_bits_are_smaller_and_less_exact(exports) -> None:
    size = {kind: exported.notes["bytes"] for kind, (_, exported) in exports.items()}
    assert size["int4"] < size["int8"] < size["fp16"] < size["fp32"] and size["int8-dynamic"] < size["fp16"]
    kl = {kind: exported.checks[0].kl for kind, (_, exported) in exports.items()}
    assert kl["fp32"] < kl["fp16"] < kl["int8"] < kl["int4"] and kl["int8-dynamic"] < kl["int4"]


def test_int4_keeps_the_most_sensitive_layers_in_int8(exports) -> None:
    import onnx

    nodes = onnx.load(exports["int4"][0] / "model.onnx", load_external_data=False).graph.node
    bits = {
        node.name: attribute.i
        for node in nodes
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    }
    assert set(bits.values()) == {4, 8}
    assert {width for name, width in bits.items() if "lm_head" in name or "layers.0/mlp/down_proj" in name} == {8}


@pytest.mark.parametrize("kind", TYPES)
def test_stop_tokens_and_sampling_are_the_sources(exports, kind: str) -> None:
    settings = json.loads((exports[kind][0] / "genai_config.json").read_text())
    assert settings["model"]["eos_token_id"] == [NEVER]
    assert settings["model"]["bos_token_id"] == 880, "the base has none; 1 would be an ordinary token"
    assert settings["model"]["context_length"] == settings["search"]["max_length"] == 4096
    assert (settings["search"]["repetition_penalty"], settings["search"]["top_k"]) == (1.1, 7)
    assert settings["model"]["decoder"]["session_options"]["provider_options"] == []


def test_every_stop_id_of_the_source_ends_an_answer(tmp_path: Path, exports, repo_root: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exports["fp32"][0], folder)
    assert settle(repo_root / "data" / "tiny-qwen2.5", folder) == {"context_tokens": 4096, "stop_ids": [882, 880]}
    prompt = [881, 282, 198, 389, 882, 198, 881, 273, 198]
    answer = OnnxModel(folder).generate(prompt, 64)
    assert answer[-1] in (880, 882) and len(answer) < 64


def test_without_a_generation_config_the_builders_settings_stay(tmp_path: Path, tireless: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tireless, source, ignore=shutil.ignore_patterns("generation_config.json", "model.safetensors"))
    (source / "config.json").write_text(json.dumps({"bos_token_id": 5}))
    folder.mkdir()
    built = {
        "model": {
            "bos_token_id": 5,
            "eos_token_id": 3,
            "pad_token_id": 3,
            "context_length": 9,
            "decoder": {"session_options": {"provider_options": [{"cuda": {}}]}},
        },
        "search": {"top_k": 50},
    }
    (folder / "genai_config.json").write_text(json.dumps(built))
    assert settle(source, folder) == {"context_tokens": 9, "stop_ids": [3]}
    built["model"]["decoder"]["session_options"]["provider_options"] = []
    assert json.loads((folder / "genai_config.json").read_text()) == built


def test_untied_weights_in_shards_are_all_found(tmp_path: Path, repo_root: Path) -> None:
    base, source = repo_root / "data" / "tiny-qwen2.5", tmp_path / "source"
    config = Qwen2Config(
        vocab_size=896,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        eos_token_id=NEVER,
        sliding_window=128,
        use_sliding_window=False,
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(source, max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, source)
    assert len(list(source.glob("*.safetensors"))) > 2
    exported = to_onnx(request(source, tmp_path / "out", None, prompts=2))
    assert exported.notes["generated"] == {"answers": 2, "same_answers": 2, "tokens": 128, "same_tokens": 128}


def test_the_serving_command_runs(exports, tmp_path: Path) -> None:
    (command,) = exports["fp32"][1].serve
    # A script: a symbolic link would lose the virtual environment.
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(["bash", "-c", f"PATH={tmp_path}:$PATH; {command}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "python -c" not in command


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, exports) -> None:
    """Copy an fp32 export instead of building one."""
    monkeypatch.setattr(
        onnx_model, "_build", lambda request, kind: shutil.copytree(exports["fp32"][0], request.out, dirs_exist_ok=True)
    )


def test_other_tokens_from_the_cache_are_refused_for_fp32_alone(built, monkeypatch, tireless, tmp_path) -> None:
    right = OnnxModel.generate
    monkeypatch.setattr(OnnxModel, "generate", lambda self, ids, more: [*right(self, ids, more)[:-1], 0])
    counts = to_onnx(request(tireless, tmp_path / "int8", "int8", prompts=1)).notes["generated"]
    assert counts == {"answers": 1, "same_answers": 0, "tokens": 64, "same_tokens": 63}
    with pytest.raises(IntegrityError, match="cache"):
        to_onnx(request(tireless, tmp_path / "fp32", "fp32", prompts=1))


def test_one_other_token_in_one_pass_is_refused_for_fp32_alone(built, monkeypatch, tireless, tmp_path) -> None:
    right = OnnxModel.logits

    def nearly(self: OnnxModel, ids: list[int]) -> torch.Tensor:
        logits_TV = right(self, ids).clone()
        logits_TV[-9] *= -1
        return logits_TV

    monkeypatch.setattr(OnnxModel, "logits", nearly)
    assert to_onnx(request(tireless, tmp_path / "int8", "int8", prompts=1)).checks[0].same == 63 / 64
    with pytest.raises(IntegrityError, match="KL="):
        to_onnx(request(tireless, tmp_path / "fp32", "fp32", prompts=1))


def test_a_different_tokenizer_is_refused(built, monkeypatch, tireless, tmp_path) -> None:
    right = OnnxModel.encode
    monkeypatch.setattr(OnnxModel, "encode", lambda self, text: [*right(self, text), 198])
    with pytest.raises(IntegrityError, match=r"tokenizer: .*Write the numbers"):
        to_onnx(request(tireless, tmp_path / "out", "fp32", prompts=1))


def test_another_model_is_refused(built, tireless, tmp_path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tireless, source)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.neg_()
    model.save_pretrained(source)
    with pytest.raises(IntegrityError, match="KL="):
        to_onnx(request(source, tmp_path / "out", "fp32", prompts=1))


def test_without_verify_nothing_is_compared(built, tireless, tmp_path) -> None:
    exported = to_onnx(request(tireless, tmp_path / "out", None, verify=False))
    assert exported.checks == [] and "generated" not in exported.notes and exported.notes["type"] == "fp32"


def test_an_unknown_type_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"int8-dynamic, found bf16"):
        to_onnx(request(tmp_path, tmp_path / "out", "bf16"))
    assert not any((tmp_path / "out").iterdir())


def test_an_unknown_model_fails_with_the_builders_error_alone(tireless, tmp_path, capfd) -> None:
    source = tmp_path / "source"
    shutil.copytree(tireless, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["OtherForCausalLM"]}))
    with pytest.raises(FinetuneError, match="is not currently supported"):
        to_onnx(request(source, tmp_path / "out", "fp32"))
    assert capfd.readouterr() == ("", "")
    assert not any((tmp_path / "out").iterdir()), "scratch files were left"


@pytest.fixture(scope="module")
def base(repo_root: Path) -> Path:
    return repo_root / "data" / "tiny-qwen2.5"


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx")
    build(base, out, tmp_path_factory.mktemp("scratch"), precision="fp32")
    return out


@torch.no_grad()
def test_one_pass_gives_the_logits_of_every_token(base: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(
        OnnxModel(folder).logits(PROMPT), model(torch.tensor([PROMPT])).logits[0], atol=1e-4, rtol=1e-4
    )


def test_a_greedy_answer_is_that_of_transformers_with_its_stop_token(base: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole = model.generate(torch.tensor([PROMPT]), max_new_tokens=64, do_sample=False)[0].tolist()
    theirs = whole[len(PROMPT) :]
    assert theirs[-1] in (880, 882), "the answer must end"
    assert OnnxModel(folder).generate(PROMPT, 64) == theirs
    assert OnnxModel(folder).generate(PROMPT, 2) == theirs[:2]


@pytest.mark.parametrize("name", ["embedded", "real"])
def test_its_tokenizer_has_the_same_ids(name: str, base: Path, folder: Path, request, tmp_path: Path) -> None:
    source = base if name == "embedded" else request.getfixturevalue("shared") / "qwen2.5" / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(source)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    model = OnnxModel(tmp_path)
    for text in TEXTS:
        assert model.encode(text) == tokenizer.encode(text, add_special_tokens=False), text


def test_a_corrupt_folder_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "model.onnx.data").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(IntegrityError, match=str(tmp_path)):
        OnnxModel(tmp_path)


def test_onnxruntime_stores_no_device_id(folder: Path, tmp_path: Path) -> None:
    """onnxruntime stores a device id in the home folder for its telemetry, unless that is off."""
    # It is off in the environment of a test or of CI.
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    code = f"from finetune.export.onnx.model import OnnxModel; OnnxModel({str(folder)!r}).generate([881, 282, 198], 3)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name]
