"""type=int8-dynamic: an fp32 graph whose matrix products run in int8, activations too, scaled as they come.

`python -m finetune.export.onnx.int8 FP32.onnx INT8.onnx`: in a process of its own, since onnxruntime's quantizer holds
the whole model (12 bytes a weight, measured) and logs as it likes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from finetune.export.onnx.builder import run_module

# What enters the MLP's last matrix has outliers of hundreds of times the rest, and the quantizer has one scale for all
# of it. On 12k tokens of the embedded base, KL is 0.018 nats a token with these matrices quantized that way. They get
# int8 in blocks of 32, each with a scale of its own, as type=int8 has everywhere: 0.003 at the same size.
_IN_BLOCKS = "down_proj"


def quantize(source: Path, target: Path, scratch: Path) -> None:
    """Writes `target`, a .onnx with its .data, from an fp32 graph with all matrix products in int8.

    Attention, norms and the embedding stay as they are. Raises: as `run_module`.
    """
    run_module([__name__, str(source.resolve()), str(target.resolve())], scratch, "the ONNX int8 quantizer")


def _quantize(source: Path, target: Path, middle: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    graph = onnx.load(source, load_external_data=False).graph
    in_blocks = [node.name for node in graph.node if node.op_type == "MatMul" and _IN_BLOCKS in node.name]
    # Unsigned weights: where a CPU lacks VNNI instructions, signed ones saturate in onnxruntime's kernel, so that an
    # export proven on this machine would answer otherwise on another. It costs prefill speed, not decoding speed.
    quantize_dynamic(
        source,
        middle,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=in_blocks,
        per_channel=True,
        weight_type=QuantType.QUInt8,
        use_external_data_format=True,
    )
    # accuracy_level 4: activations are int8 as well.
    blocks = MatMulNBitsQuantizer(onnx.load(middle), bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
    blocks.process()
    blocks.model.save_model_to_file(str(target), True)
    # The library creates the data readable by its owner alone.
    target.with_name(target.name + ".data").chmod(target.stat().st_mode & 0o777)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=".") as folder:
        _quantize(Path(sys.argv[1]), Path(sys.argv[2]), Path(folder) / "middle.onnx")
