"""Run onnxruntime-genai's model builder and onnxruntime's quantizer in a process each.

The builder changes `sys.path`, prints every tensor and keeps the model until the process ends. Its own process hides
that from the caller and frees its memory.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.system.errors import FinetuneError, MissingExtra, ResourceError

# Without it, onnxruntime 1.32 and onnxruntime-genai 0.18 store a device id in the home folder and send telemetry.
_QUIET = {"ORT_DISABLE_TELEMETRY": "1"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
_SHOWN_LINES = 12
_OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "can't allocate memory", "not enough memory")


def runtime() -> Any:
    """Import onnxruntime-genai, or raise MissingExtra if a library of the extra is missing."""
    os.environ.update(_QUIET)
    try:
        for module in ("onnx", "onnx_ir", "onnxruntime"):
            importlib.import_module(module)
        return importlib.import_module("onnxruntime_genai")
    except ImportError as error:
        raise MissingExtra(f'ONNX export needs: pip install "finetune-qlora[onnx]" ({error})') from error


def build(
    source: Path, out: Path, scratch: Path, *, precision: str, provider: str = "cpu", options: Sequence[str] = ()
) -> None:
    """Write the graph, genai_config.json and the tokenizer with the builder's options of these names; as `run_module`.

    Memory: about 4.5 bytes per weight for fp32, 9 for int8, 15 for int4 by k_quant (measured on 0.6B weights).
    """
    command = ["onnxruntime_genai.models.builder", "-i", str(source.resolve()), "-o", str(out.resolve())]
    command += ["-p", precision, "-e", provider, "-c", str(scratch.resolve() / "cache")]
    run_module([*command, "--extra_options", "hf_token=false", *options], scratch, "the ONNX model builder")


def run_module(command: Sequence[str], folder: Path, what: str) -> None:
    """Run `python -m` in a folder without output; what: the program's name for errors.

    Raises:
        FinetuneError: the program failed; the error has its last lines.
        ResourceError: memory or disk ran out.
    """
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, **_QUIET, **_OFFLINE},
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return
    # -9: killed by Linux for lack of memory.
    if done.returncode == -9 or any(words in done.stdout for words in _OUT_OF_MEMORY):
        raise ResourceError(f"{what}: out of memory\nhelp: use a larger machine, or type=fp32, which needs the least")
    if "No space left on device" in done.stdout:
        raise ResourceError(f"{what}: the disk of {folder} is full\nhelp: free space or name another disk with out=")
    lines = [line.strip() for line in done.stdout.replace("\r", "\n").splitlines() if line.strip()]
    raise FinetuneError(f"{what}: failed with exit code {done.returncode}:\n  " + "\n  ".join(lines[-_SHOWN_LINES:]))
