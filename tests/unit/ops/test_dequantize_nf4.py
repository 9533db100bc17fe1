"""The Triton kernel without a GPU: its values on CPU tensors, and its binaries for five generations of GPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT

# Where .ci/run installs Triton. Only these processes see it: with it, torch and others take paths of GPU machines.
FOLDER = Path(sys.prefix) / "triton"


def findings(what: str, cache: Path, **environment: str) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None and not FOLDER.is_dir():
        pytest.skip(f"needs Triton: pip install --no-deps --target {FOLDER} triton==3.7.1")
    variables = {"PYTHONPATH": str(FOLDER), "TRITON_CACHE_DIR": str(cache), "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "tests.triton_kernels", what]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_values_are_those_of_bitsandbytes(tmp_path: Path):
    distances = findings("values", tmp_path, TRITON_INTERPRET="1")
    assert len(distances) == 108
    # The interpreter truncates to bf16; a GPU rounds (tests/gpu/test_dequantize_gpu.py).
    assert not {case: steps for case, steps in distances.items() if steps > case.endswith("bfloat16")}


def test_a_launch_is_one_kernel_that_rounds_after_each_operation(tmp_path: Path):
    found = findings("targets", tmp_path)
    assert {case.split()[0] for case in found} == {"75", "80", "89", "90", "120"} and len(found) == 30
    for case, kernels in found.items():
        assert kernels["launches"] == 2 and len(kernels["instructions"]) == 1, case
        [instructions] = kernels["instructions"]
        # A fused multiply-add has other bits than the two kernels of bitsandbytes.
        assert not [word for word in instructions if word.startswith("fma")], case
        assert "st.global.v4.b32" in instructions, case  # 16 bytes of a thread at once
