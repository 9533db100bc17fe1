"""A device that torch learns of at run time trains like the CPU: no path needs CUDA, and no tensor stays behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import SMALL_RUN, metrics, reference_run

# In fp32, and without the random numbers that each device draws for itself, so that both give nearly the same figures.
EXACT = (
    "model.dtype=float32",
    "quant.compute_dtype=float32",
    "lora.dropout=0",
    "train.neftune_alpha=0",
    "train.max_steps=2",
    "quant.cache=false",
    "data.train.0.limit=24",
    "data.eval.0.limit=4",
)
# Without pinned memory: inputs of layers are copied to main memory, and a teacher's layers from their files.
COPIES = ("train.gradient_checkpointing=offload", "distill.objective=sft+anchor", "distill.teacher.placement=streamed")
MIXED = """
import torch
from tests import fake_device
device = fake_device.install()
weight = torch.ones(3, 4, device=device, requires_grad=True)
(weight @ torch.ones(4, 2).to(device)).sum().backward()
print(weight.grad.device, weight.grad.cpu().tolist())
try:
    weight + torch.ones(4)
except RuntimeError as error:
    print("refused", error)
"""


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_device_computes_and_refuses_tensors_of_the_cpu():
    shown = run("-c", MIXED).splitlines()
    assert shown[0] == f"toy:0 {[[2.0] * 4] * 3}"
    assert shown[1].startswith("refused")


@pytest.mark.parametrize("overrides", [(), COPIES], ids=["plain", "copies"])
def test_a_run_there_learns_as_on_the_cpu(overrides: tuple[str, ...], tmp_path: Path):
    words = (*SMALL_RUN, *EXACT, *overrides)
    shown = run("-m", "tests.fake_device", "train", "config=quickstart.yaml", f"output_dir={tmp_path / 'run'}", *words)
    assert "toy device" in shown, "the run names a device that no test ran on"
    for here, there in zip(metrics(reference_run(*EXACT, *overrides)), metrics(tmp_path / "run"), strict=True):
        assert there == pytest.approx(here, rel=1e-3)
