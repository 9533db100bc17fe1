"""launch/tensorrt-llm: what its script starts, and how it quantizes, with a stand-in for ModelOpt.

The container itself needs a GPU. The script was run with ModelOpt 0.37 and transformers 4.57, which it has, on a CPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from finetune.config.command_options import ServeOptions
from finetune.system.resources import packaged
from tests.clusters import ROOT, make_program

FOLDER = ROOT / "launch" / "tensorrt-llm"
ROWS = [
    {"messages": [{"role": "user", "content": f"Question {n}"}, {"role": "assistant", "content": "Yes. " * 40}]}
    for n in range(5)
]


def serve(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run serve.sh with programs that print their arguments."""
    for name in ("python3", "finetune"):
        make_program(folder / name, f'#!/usr/bin/env bash\necho {name} "$@"\n')
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(FOLDER / "serve.sh"), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_a_merged_model_is_quantized_once_and_served(tmp_path: Path):
    words = ("outputs/merged/", "outputs/lora", "rows.jsonl", "serve.max_batch=8")
    served = (
        "finetune serve model=outputs/merged-fp8 serve.check=outputs/lora engine=tensorrt_llm host=0.0.0.0 "
        "serve.max_batch=8"
    )
    quantized = f"python3 {FOLDER}/quantize.py outputs/merged rows.jsonl outputs/merged-fp8"
    assert serve(tmp_path, *words).stdout.splitlines() == [quantized, served]
    (tmp_path / "outputs" / "merged-fp8").mkdir(parents=True)
    assert serve(tmp_path, *words).stdout.splitlines() == [served]
    assert ServeOptions(model="outputs/merged-fp8", engine="tensorrt_llm", host="0.0.0.0").engine == "tensorrt_llm"


def test_without_its_arguments_the_script_shows_them(tmp_path: Path):
    done = serve(tmp_path, "outputs/merged")
    assert done.returncode == 2 and "MERGED RUN ROWS.jsonl" in done.stderr and not done.stdout


class ModelOpt:
    """The two functions of ModelOpt that the script calls, with their parameters; notes what the model is given."""

    def __init__(self) -> None:
        self.settings: Any = None
        self.seen: list[list[int]] = []
        self.FP8_DEFAULT_CFG = {"algorithm": "max"}

    def quantize(self, model: torch.nn.Module, config: Any, forward_loop: Any) -> torch.nn.Module:
        self.settings = config
        model.forward = lambda ids: self.seen.extend(ids.tolist())  # type: ignore[method-assign]
        forward_loop(model)
        return model

    @staticmethod
    def export_hf_checkpoint(model: Any, dtype: Any = None, export_dir: Path | str = "") -> None:
        model.save_pretrained(export_dir)


@pytest.fixture
def modelopt(monkeypatch: pytest.MonkeyPatch) -> ModelOpt:
    stand_in = ModelOpt()
    for name in ("modelopt", "modelopt.torch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr(sys.modules["modelopt.torch"], "quantization", stand_in, raising=False)
    export = SimpleNamespace(export_hf_checkpoint=stand_in.export_hf_checkpoint)
    monkeypatch.setitem(sys.modules, "modelopt.torch.export", export)  # type: ignore[arg-type]
    return stand_in


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(packaged("data") / "tiny-qwen2.5", tmp_path / "merged"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    config.pop("rope_theta", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantize(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    spec = importlib.util.spec_from_file_location("quantize_fp8", FOLDER / "quantize.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, arguments), "--device", "cpu"])
    script.main()


def test_activations_are_measured_on_the_rows_in_the_models_template(merged, modelopt, tmp_path, monkeypatch):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"text": "plain"}]))
    quantize(monkeypatch, merged, rows, out, "--examples", "4", "--tokens", "30")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    wanted = [tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"][:30] for row in ROWS[:4]]
    assert modelopt.seen == wanted and modelopt.settings is modelopt.FP8_DEFAULT_CFG
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (merged / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    # transformers 4 and TensorRT-LLM read this key, and take 10,000 without it.
    assert config["rope_theta"] == 1e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "out", "rows.jsonl"]
    modelopt.seen.clear()
    quantize(monkeypatch, merged, rows, tmp_path / "more", "--tokens", "8")
    assert len(modelopt.seen) == 6 and modelopt.seen[-1] == tokenizer("plain")["input_ids"][:8]
    with pytest.raises(SystemExit):
        quantize(monkeypatch, merged, rows, out)


def test_a_row_that_is_no_text_is_refused_by_its_line(merged, modelopt, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{json.dumps(ROWS[0])}\n{{"instruction": "a", "output": "b"}}\n')
    with pytest.raises(SystemExit, match=r"rows\.jsonl:2: .*instruction"):
        quantize(monkeypatch, merged, rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()
