"""onnxruntime-genai has the logits, the greedy answers and the token ids of transformers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.export.onnx.builder import build
from finetune.export.onnx.reader import OnnxModel
from finetune.system.errors import IntegrityError

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


@pytest.fixture(scope="module")
def base(repo_root: Path) -> Path:
    return repo_root / "data" / "tiny-qwen2.5"


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"):
        pytest.importorskip(module, reason='needs pip install "finetune-qlora[onnx]"')
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
    code = f"from finetune.export.onnx.reader import OnnxModel; OnnxModel({str(folder)!r}).generate([881, 282, 198], 3)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name]
