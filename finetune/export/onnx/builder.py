"""Run onnxruntime-genai's model builder and onnxruntime's quantizer in a process each.

The builder changes `sys.path`, prints every tensor and keeps the model until the process ends. Its own process hides
that from the caller and frees its memory. The quantizer prints logs and holds the whole model (12 bytes per weight,
measured); it runs as `python -m finetune.export.onnx.builder FP32.onnx INT8.onnx`.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.system.errors import FinetuneError, MissingExtra, ResourceError

# Without it, onnxruntime 1.32 and onnxruntime-genai 0.18 store a device id in the home folder and send telemetry.
_QUIET = {"ORT_DISABLE_TELEMETRY": "1"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
_SHOWN_LINES = 12
_OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "can't allocate memory", "not enough memory")
# The input of down_proj has outliers of hundreds of times its other values, and the quantizer uses one scale for all.
# With it, KL is 0.018 nats per token on 12k tokens of the embedded base. These matrices use int8 blocks of 32 with a
# scale each, as type=int8 does everywhere: 0.003 at the same size.
_IN_BLOCKS = "down_proj"


def runtime() -> Any:
    """Import onnxruntime-genai, or raise MissingExtra if a library of the extra is missing."""
    os.environ.update(_QUIET)
    try:
        for module in ("onnx", "onnx_ir", "onnxruntime"):
            importlib.import_module(module)
        return importlib.import_module("onnxruntime_genai")
    except ImportError as error:
        raise MissingExtra(f'ONNX export needs: pip install "finetune-qlora[export]" ({error})') from error


def build(
    source: Path, out: Path, scratch: Path, *, precision: str, provider: str = "cpu", options: Sequence[str] = ()
) -> None:
    """Write the graph, genai_config.json and the tokenizer with the builder's options of these names; as `run_module`.

    Memory: about 4.5 bytes per weight for fp32, 9 for int8, 15 for int4 by k_quant (measured on 0.6B weights).
    """
    command = ["onnxruntime_genai.models.builder", "-i", str(source.resolve()), "-o", str(out.resolve())]
    command += ["-p", precision, "-e", provider, "-c", str(scratch.resolve() / "cache")]
    run_module([*command, "--extra_options", "hf_token=false", *options], scratch, "the ONNX model builder")


def quantize(source: Path, target: Path, scratch: Path) -> None:
    """Write `target`, a .onnx with its .data, from an fp32 graph: matrix products in int8, activations dynamically.

    Attention, norms and the embedding do not change.
    """
    run_module([__name__, str(source.resolve()), str(target.resolve())], scratch, "the ONNX int8 quantizer")


def run_module(command: Sequence[str], folder: Path, what: str) -> None:
    """Run `python -m` in a folder without output; what: the program's name for errors.

    Raises:
        FinetuneError: the program failed; the error has its last lines.
        ResourceError: memory or disk ran out.
    """
    done = subprocess.run(
        # Unbuffered: otherwise its last lines are those of stdout, whenever the error was written.
        [sys.executable, "-u", "-m", *command],
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


def _quantize(source: Path, target: Path, middle: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    graph = onnx.load(source, load_external_data=False).graph
    in_blocks = [node.name for node in graph.node if node.op_type == "MatMul" and _IN_BLOCKS in node.name]
    # Signed weights saturate in onnxruntime's kernel on CPUs without VNNI instructions, so the answers would depend on
    # the machine. Unsigned weights cost prefill speed, but no decoding speed.
    quantize_dynamic(
        source,
        middle,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=in_blocks,
        per_channel=True,
        weight_type=QuantType.QUInt8,
        use_external_data_format=True,
    )
    # accuracy_level 4: int8 activations.
    blocks = MatMulNBitsQuantizer(onnx.load(middle), bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
    blocks.process()
    blocks.model.save_model_to_file(str(target), True)
    # The library makes the data readable by its owner only.
    target.with_name(target.name + ".data").chmod(target.stat().st_mode & 0o777)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=".") as folder:
        _quantize(Path(sys.argv[1]), Path(sys.argv[2]), Path(folder) / "middle.onnx")
