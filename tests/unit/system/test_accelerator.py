"""Every question about the accelerator has one answer, by the kind of its device."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune.system import accelerator
from finetune.system.accelerator import KINDS, DeviceMemory, default_device, device_warning, kind_of, on_gpu, table_key

PACKAGE = Path(accelerator.__file__).parents[1]
# The name of CUDA in ONNX Runtime, not a device of torch.
OTHER_CUDA = {"export/onnx/model.py"}


def have(monkeypatch: pytest.MonkeyPatch, device_type: str | None) -> None:
    """Let torch have an accelerator of this type."""
    found = None if device_type is None else torch.device(device_type)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)


@pytest.mark.parametrize(
    ("found", "rank", "expected"),
    [(None, "3", "cpu"), ("cuda", "3", "cuda:3"), ("cuda", None, "cuda:0"), ("xpu", "1", "xpu:1")],
)
def test_each_rank_has_its_own_device(monkeypatch, found: str | None, rank: str | None, expected: str):
    have(monkeypatch, found)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert default_device() == torch.device(expected)


@pytest.mark.parametrize("device_type", ["mps", "privateuseone"])
def test_a_refused_or_unknown_device_leaves_the_run_on_the_cpu_and_says_so(monkeypatch, device_type: str):
    have(monkeypatch, device_type)
    assert default_device() == torch.device("cpu")
    warning = device_warning()
    assert warning is not None and kind_of(device_type).refused and kind_of(device_type).refused in warning


def test_a_device_that_no_test_ran_on_is_used_with_a_warning(monkeypatch):
    have(monkeypatch, "xpu")
    warning = device_warning()
    assert warning is not None and warning.startswith("WARNING") and KINDS["xpu"].name in warning
    for tested in ("cuda", None):
        have(monkeypatch, tested)
        assert device_warning() is None


def test_a_rocm_build_is_another_kind_than_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert kind_of("cuda") is KINDS["cuda"] and KINDS["cuda"].fp32_results
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert kind_of("cuda") is KINDS["rocm"] and not KINDS["rocm"].fp32_results


def test_only_the_cpu_and_tensors_without_memory_are_no_gpu():
    tensor = torch.empty(0)
    assert [on_gpu(place) for place in (tensor, tensor.device, "cpu", torch.empty(0, device="meta"))] == [False] * 4
    assert on_gpu("xpu") and on_gpu(torch.device("cuda", 1))
    assert (table_key("cpu"), table_key("cuda"), table_key("xpu")) == ("cpu", "gpu", "gpu")


def test_nvidias_driver_reports_the_gpu_and_a_missing_gpu_is_no_error(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(accelerator, "_GRAPHICS", tmp_path)
    assert accelerator.device_memory() is None
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA A100, 80GB, 81920, 80000'\n")
    command.chmod(0o755)
    assert accelerator.device_memory() == DeviceMemory("NVIDIA A100, 80GB", 81920 * 2**20, 80000 * 2**20)


def test_amds_driver_reports_the_gpu_that_the_process_may_see(tmp_path: Path, monkeypatch):
    for number, used in ((0, 100), (1, 200), (10, 300)):
        card = tmp_path / f"card{number}/device"
        card.mkdir(parents=True)
        (card / "mem_info_vram_total").write_text("1000\n")
        (card / "mem_info_vram_used").write_text(f"{used}\n")
    (tmp_path / "card0/device/product_name").write_text("Instinct MI300X\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(accelerator, "_GRAPHICS", tmp_path)
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert accelerator.device_memory() == DeviceMemory("Instinct MI300X", 1000, 900)
    for chosen, free in (("1,0", 800), ("2", 700)):
        monkeypatch.setenv("HIP_VISIBLE_DEVICES", chosen)
        assert accelerator.device_memory() == DeviceMemory("AMD GPU", 1000, free)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "3")
    assert accelerator.device_memory() is None


def questions_for_cuda(source: str) -> Iterator[int]:
    """Yield the lines that name CUDA: torch.cuda, .is_cuda, .cuda() and "cuda" as a value."""
    for node in ast.walk(ast.parse(source)):
        named = isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda")
        word = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] == "cuda"
        imported = isinstance(node, ast.Import | ast.ImportFrom) and "torch.cuda" in ast.unparse(node)
        if named or word or imported:
            yield node.lineno


def test_the_package_asks_for_cuda_in_one_file_only():
    """`torch.backends.cuda` is read everywhere: these settings do nothing without CUDA."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        lines = set(questions_for_cuda(file.read_text().replace("torch.backends.cuda.", "torch.backends.")))
        if lines and name not in OTHER_CUDA | {"system/accelerator.py"}:
            found[name] = sorted(lines)
    assert not found


@pytest.mark.parametrize(
    "source", ["torch.cuda.synchronize()", "x.is_cuda", "x.cuda()", 'x.to("cuda:0")', "from torch.cuda import Stream"]
)
def test_a_forgotten_question_for_cuda_is_found(source: str):
    assert list(questions_for_cuda(source)) == [1]
