"""type=int8-dynamic: every matrix product is in int8, everything else is unchanged."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from finetune.export.onnx.builder import build
from finetune.export.onnx.int8 import quantize


@pytest.fixture(scope="module")
def graphs(repo_root: Path, tmp_path_factory: pytest.TempPathFactory):
    onnx = pytest.importorskip("onnx", reason='needs pip install "finetune-qlora[onnx]"')
    for module in ("onnx_ir", "onnxruntime", "onnxruntime_genai"):
        pytest.importorskip(module, reason='needs pip install "finetune-qlora[onnx]"')
    source, target, scratch = (tmp_path_factory.mktemp(name) for name in ("fp32", "int8", "scratch"))
    build(repo_root / "data" / "tiny-qwen2.5", source, scratch, precision="fp32")
    quantize(source / "model.onnx", target / "model.onnx", scratch)
    assert not any(scratch.iterdir()), "scratch files were left"
    assert sorted(path.name for path in target.iterdir()) == ["model.onnx", "model.onnx.data"]
    return [onnx.load(folder / "model.onnx", load_external_data=False).graph for folder in (source, target)]


def count(graph) -> collections.Counter:
    return collections.Counter(node.op_type for node in graph.node)


def test_every_matrix_product_is_in_int8(graphs) -> None:
    before, after = map(count, graphs)
    layers = before["GroupQueryAttention"]
    assert after["MatMul"] == 0
    assert after["MatMulNBits"] == layers and after["MatMulInteger"] == before["MatMul"] - layers
    assert all("down_proj" in node.name for node in graphs[1].node if node.op_type == "MatMulNBits")


def test_blocks_have_eight_bits_and_int8_activations(graphs) -> None:
    found = {
        tuple((key, node_attributes(node)[key]) for key in ("bits", "block_size", "accuracy_level"))
        for node in graphs[1].node
        if node.op_type == "MatMulNBits"
    }
    assert found == {(("bits", 8), ("block_size", 32), ("accuracy_level", 4))}


def node_attributes(node) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def test_attention_norms_and_the_embedding_are_unchanged(graphs) -> None:
    before, after = map(count, graphs)
    for kind in ("GroupQueryAttention", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "Gather"):
        assert after[kind] == before[kind] > 0


def test_no_weight_is_signed(graphs) -> None:
    """Signed weights saturate on CPUs without VNNI, so the answers would depend on the machine."""
    import onnx

    types = {tensor.name: tensor.data_type for tensor in graphs[1].initializer}
    weights = [types[node.input[1]] for node in graphs[1].node if node.op_type == "MatMulInteger"]
    assert set(weights) == {onnx.TensorProto.UINT8}
