"""Run each measurement in a fresh process, so that memory, caches and threads of one run cannot help the next.

A measuring module is started as `python -m benchmarks.NAME key=value …` and prints one JSON object on its last line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_SHOWN_LINES = 6


def parse(words: Sequence[str], defaults: Mapping[str, str], prefixes: tuple[str, ...] = ()) -> dict[str, str]:
    """Parse `key=value` words over the defaults; keys that start with one of `prefixes` are accepted too.

    Raises: SystemExit with the nearest known key.
    """
    options = dict(defaults)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or (key not in defaults and not key.startswith(prefixes or ("\0",))):
            near = get_close_matches(key, defaults, n=1)
            hint = f"; did you mean {near[0]}=" if near else ""
            raise SystemExit(
                f"unknown option {word!r}{hint}; options: {' '.join(f'{k}={v}' for k, v in defaults.items())}"
            )
        options[key] = value
    return options


def work_folder(given: str = "") -> Path:
    """Return the folder of random models and their quantized copies, kept between benchmarks."""
    cache = os.environ.get("FINETUNE_CACHE") or "~/.cache/finetune"
    folder = Path(given or f"{cache}/benchmarks").expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def measure(module: str, options: Mapping[str, Any], limit_seconds: float, cache: Path | None = None) -> dict[str, Any]:
    """Return the JSON object that `python -m module key=value …` prints last, or `{"failed": reason}`.

    limit_seconds: time after which the process and its children are killed. cache: its FINETUNE_CACHE; None: unchanged.
    """
    words = [f"{key}={value}" for key, value in options.items()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if cache is not None:
        environment["FINETUNE_CACHE"] = str(cache)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return {"failed": f"not done after {limit_seconds:.0f} s"}
        except BaseException:
            _end(process)
            raise
        errors.seek(0)
        said = errors.read().splitlines()
    if process.returncode == 0:
        return json.loads(output.splitlines()[-1])
    return {"failed": _reason(said, process.returncode), "stderr": said[-_SHOWN_LINES:]}


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the process and its children, which share its session."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(said: list[str], code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed: out of memory"
    return next((line.strip() for line in reversed(said) if line.strip()), f"exit code {code}")[:200]


def device() -> dict[str, Any]:
    """Describe this machine's device, without starting CUDA in this process.

    multiplies_in: float32 on a CPU without bf16 instructions.
    """
    code = (
        "import json, torch; from finetune.ops.matmul import uses_fp32_matmul; cuda = torch.cuda.is_available(); "
        "wide = uses_fp32_matmul(torch.device('cuda' if cuda else 'cpu'), torch.bfloat16); "
        "print(json.dumps({'kind': 'cuda' if cuda else 'cpu', 'name': torch.cuda.get_device_name() if cuda else 'cpu', "
        "'torch': torch.__version__, 'multiplies_in': 'float32' if wide else 'bfloat16', "
        "'bytes': torch.cuda.get_device_properties(0).total_memory if cuda else None}))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return {**json.loads(done.stdout.splitlines()[-1]), "cores": len(os.sched_getaffinity(0))}
