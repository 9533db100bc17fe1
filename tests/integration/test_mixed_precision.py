"""Mixed precision with the real commands: measure, allocate, train, merge, export, load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune import load_config
from finetune.models.load import load_base
from finetune.models.quant.quantize import stored_as
from tests.commands import Done, run_here
from tests.runs import SMALL_RUN, adapter, result

SMALL = ("config=quickstart.yaml", "data.train.0.limit=96", "data.eval.0.limit=24", "data.max_length=128")
BUDGET = "0.0034"


def finetune(cwd: Path, *words: str) -> Done:
    done = run_here(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with sensitivities and an allocation."""
    folder = tmp_path_factory.mktemp("here")
    measured = finetune(folder, "sensitivity", *SMALL, "rows=8")
    assert measured.stdout == "sensitivity\n" and "next: finetune allocate config=quickstart.yaml" in measured.stderr
    chosen = finetune(folder, "allocate", *SMALL, f"budget_gb={BUDGET}", "rows=12")
    assert chosen.stdout == "configs/quant/allocated.yaml\n" and "quant=allocated" in chosen.stderr
    return folder


@pytest.fixture(scope="module")
def trained(here: Path) -> Path:
    finetune(
        here,
        "train",
        "config=quickstart.yaml",
        "quant=allocated",
        *SMALL_RUN,
        "lora.target_modules=all-linear",
        "train.learning_rate=2e-3",
        "train.save_every=2",
        "output_dir=run",
    )
    return here / "run"


def test_the_allocation_holds_its_origin_and_is_a_config(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = here / "configs" / "quant" / "allocated.yaml"
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert f"finetune allocate {' '.join(SMALL)} budget_gb={BUDGET} rows=12" in header[1]
    assert "the allocation (this one)" in "".join(header) and "all nf4" in "".join(header)
    monkeypatch.chdir(here)
    quant = load_config("quickstart.yaml", ["quant=allocated"]).quant
    content = yaml.safe_load(file.read_text())
    assert content == {key: getattr(quant, key) for key in ("type", "double", "compute_dtype", "skip_modules", "int8")}
    assert quant.type == "nf4" and quant.skip_modules and quant.int8


def test_measuring_resumes_after_a_kill_with_the_same_values(here: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "finetune.cli", "sensitivity", *SMALL, "rows=8", f"out={tmp_path}/killed"]
    journal = tmp_path / "killed" / "measured.jsonl"
    running = subprocess.Popen(command, cwd=here, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while running.poll() is None and (not journal.exists() or len(journal.read_text().splitlines()) < 4):
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    done = len(journal.read_text().splitlines()) - 1
    assert not (journal.parent / "sensitivity.json").exists() and 0 < done < 58
    again = finetune(here, *command[3:])
    assert "/58" in again.stderr
    unbroken = here / "sensitivity" / "sensitivity.json"
    assert (journal.parent / "sensitivity.json").read_bytes() == unbroken.read_bytes()
    assert (journal.parent / "sensitivity.png").read_bytes() == (unbroken.parent / "sensitivity.png").read_bytes()


def test_a_run_trains_on_the_allocation_and_its_adapter_loads(here: Path, trained: Path) -> None:
    assert result(trained)["status"] == "finished"
    quant = load_config(str(trained / "config.yaml")).quant
    assert quant.int8 and quant.skip_modules
    base = load_base(load_config("quickstart.yaml").model, quant, "cpu")
    kinds = {stored_as(module) for name, module in base.named_modules() if name.endswith("_proj")}
    assert kinds == {"nf4", "int8", "none"}
    model: Any = PeftModel.from_pretrained(base, trained)
    tensors = adapter(trained)
    assert len(tensors) == 56 and all(tensor.any() for tensor in tensors.values())
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_a_resumed_run_ends_in_the_same_bits(here: Path, trained: Path) -> None:
    """From the checkpoint of the second step."""
    words = [
        "train",
        "config=quickstart.yaml",
        "quant=allocated",
        *SMALL_RUN,
        "lora.target_modules=all-linear",
        "train.learning_rate=2e-3",
        "train.save_every=2",
        "output_dir=resumed",
        "train.resume=auto",
    ]
    copy = here / "resumed"
    subprocess.run(["cp", "-r", str(trained), str(copy)], check=True)
    subprocess.run(["rm", "-r", str(copy / "checkpoint-4")], check=True)
    finetune(here, *words)
    assert all(tensor.equal(adapter(trained)[name]) for name, tensor in adapter(copy).items())


def test_it_merges_and_exports(here: Path, trained: Path) -> None:
    finetune(here, "merge", f"adapter={trained}", "out=merged", "base=dequantized", "kl_check.num_examples=12")
    (check,) = json.loads((here / "merged" / "merge_report.json").read_text())["kl_checks"]
    # bf16 sums of other orders: 2e-4; a layer taken for one of another kind: 5e-3.
    assert 0 <= check["kl"] < 1e-3
    finetune(here, "export", "model=merged", "format=safetensors", "type=nf4", "out=exported", "prompts=2", "tokens=4")
    tensors = load_file(here / "exported" / "model.safetensors")
    quant = load_config(str(trained / "config.yaml")).quant
    four_bit = {name.partition(".weight.")[0] for name in tensors if name.endswith("quant_state.bitsandbytes__nf4")}
    assert four_bit and len(four_bit) == 28 - len(quant.skip_modules) - len(quant.int8)
    assert four_bit.isdisjoint([*quant.skip_modules, *quant.int8])
    model = AutoModelForCausalLM.from_pretrained(here / "exported")
    assert {name for name, module in model.named_modules() if stored_as(module) == "nf4"} == four_bit
