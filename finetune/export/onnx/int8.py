"""type=int8-dynamic: quantize the matrix products of an fp32 graph to int8, activations dynamically.

`python -m finetune.export.onnx.int8 FP32.onnx INT8.onnx` runs in its own process, since onnxruntime's quantizer holds
the whole model (12 bytes per weight, measured) and prints logs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from finetune.export.onnx.builder import run_module

# The input of down_proj has outliers of hundreds of times its other values, and the quantizer uses one scale for all.
# With it, KL is 0.018 nats per token on 12k tokens of the embedded base. These matrices use int8 blocks of 32 with a
# scale each, as type=int8 does everywhere: 0.003 at the same size.
_IN_BLOCKS = "down_proj"


def quantize(source: Path, target: Path, scratch: Path) -> None:
    """Write `target`, a .onnx with its .data, from an fp32 graph; attention, norms and the embedding do not change."""
    run_module([__name__, str(source.resolve()), str(target.resolve())], scratch, "the ONNX int8 quantizer")


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
