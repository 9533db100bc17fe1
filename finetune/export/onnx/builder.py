"""onnxruntime-genai's model builder and onnxruntime's quantizer, each run in a process of its own.

The builder is a script more than a library: it puts its folder on `sys.path`, imports modules named `builders` and
`quantization` from there, prints every tensor and keeps the model until the process ends. A process of its own keeps
all of that away from the caller, and gives its memory back.
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

# onnxruntime 1.32 and onnxruntime-genai 0.18 write a device id into the home folder and post events to their maker, on
# Linux too, unless this is set before they start.
_QUIET = {"ORT_DISABLE_TELEMETRY": "1"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
_SHOWN_LINES = 12
_OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "can't allocate memory", "not enough memory")


def runtime() -> Any:
    """onnxruntime-genai, after a look that all that exporting needs is installed.

    Raises: MissingExtra with the command that installs it.
    """
    os.environ.update(_QUIET)
    try:
        for module in ("onnx", "onnx_ir", "onnxruntime"):
            importlib.import_module(module)
        return importlib.import_module("onnxruntime_genai")
    except ImportError as error:
        raise MissingExtra(f'ONNX export needs: pip install "finetune-qlora[onnx]" ({error})') from error


def build(source: Path, out: Path, precision: str, provider: str, options: Sequence[str], scratch: Path) -> None:
    """Writes model.onnx, its data, genai_config.json and the tokenizer's files into `out`.

    precision, provider, options: as the builder's own --precision, --execution_provider and --extra_options.
    scratch: a folder for what the builder keeps meanwhile.
    Memory: about 4.5 bytes a weight for fp32, 9 for int8, 15 for int4 by k_quant (measured on 0.6B weights).
    Raises: FinetuneError with the builder's last words; ResourceError if memory or disk ran out.
    """
    command = ["onnxruntime_genai.models.builder", "-i", str(source.resolve()), "-o", str(out.resolve())]
    command += ["-p", precision, "-e", provider, "-c", str(scratch.resolve() / "cache")]
    run_module([*command, "--extra_options", "hf_token=false", *options], scratch, "the ONNX model builder")


def run_module(command: Sequence[str], folder: Path, what: str) -> None:
    """`python -m` in that folder, silent unless it fails.

    Raises: FinetuneError with its last lines; ResourceError if memory or disk ran out.
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
    # -9: Linux kills what takes the last memory.
    if done.returncode == -9 or any(words in done.stdout for words in _OUT_OF_MEMORY):
        raise ResourceError(f"{what} ran out of memory; export on a machine with more, or type=fp32, which takes least")
    if "No space left on device" in done.stdout:
        raise ResourceError(f"{what} filled the disk of {folder}; free space or name another disk with out=")
    lines = [line.strip() for line in done.stdout.replace("\r", "\n").splitlines() if line.strip()]
    raise FinetuneError(f"{what} failed (exit code {done.returncode}):\n  " + "\n  ".join(lines[-_SHOWN_LINES:]))
