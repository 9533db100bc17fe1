"""What Inductor emits for our compiled kernels on a GPU, without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.unit.ops.test_dequantize_nf4 import FOLDER

# New tensors of the size of the arguments: the result of these, and fp32 temporaries of divergences.
_FULL = {
    "rms_norm_forward": 1,
    "rms_norm_backward": 1,
    "swiglu_forward": 1,
    "swiglu_backward_": 0,
    "apply_rope_forward": 1,
    "apply_rope_backward": 1,
    "cross_entropy": 0,
    "softmax": 0,
    "forward_kl": 1,
    "reverse_kl": 1,
    "jsd": 1,
    "skew_kl": 1,
}


def test_each_is_one_triton_kernel_in_place_that_knows_its_widths(tmp_path: Path):
    if importlib.util.find_spec("triton") is None and not FOLDER.is_dir():
        pytest.skip(f"needs Triton: pip install --no-deps --target {FOLDER} triton==3.7.1")
    variables = {"PYTHONPATH": str(FOLDER), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.inductor_kernels"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.keys() == _FULL.keys()
    for name, code in found.items():
        assert code == {"kernels": 1, "full": _FULL[name], "sizes": []}, name
