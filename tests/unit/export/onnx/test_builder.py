"""A program in its own process prints nothing, and fails with one error; int8-dynamic quantizes every product."""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import pytest

from finetune.export.onnx.builder import build, quantize, run_module, runtime
from finetune.system.errors import FinetuneError, MissingExtra, ResourceError


def tool(folder: Path, code: str) -> None:
    (folder / "a_tool.py").write_text(code)
    run_module(["a_tool"], folder, "the tool")


def test_its_output_is_hidden(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tool(tmp_path, "import sys; print('noise'); print('more', file=sys.stderr)")
    assert capfd.readouterr() == ("", "")


def test_it_runs_offline_without_telemetry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    tool(
        tmp_path, "import os; assert (os.environ['HF_HUB_OFFLINE'], os.environ['ORT_DISABLE_TELEMETRY']) == ('1', '1')"
    )


def test_a_failure_shows_its_last_lines(tmp_path: Path) -> None:
    code = "import sys\nfor i in range(99): print('step', i, end='\\r')\nsys.exit('the reason')"
    with pytest.raises(FinetuneError) as caught:
        tool(tmp_path, code)
    text = str(caught.value)
    assert text.startswith("the tool: failed with exit code 1") and text.endswith("the reason")
    assert "step 98" in text and "step 50" not in text and "\r" not in text


@pytest.mark.parametrize(
    "code",
    [
        "raise MemoryError",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')",
    ],
)
def test_out_of_memory_is_a_resource_error(tmp_path: Path, code: str) -> None:
    with pytest.raises(ResourceError, match="memory"):
        tool(tmp_path, code)


def test_a_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="disk"):
        tool(tmp_path, "import errno, os; raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))")


@pytest.mark.parametrize("module", ["onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"])
def test_a_missing_library_is_reported_with_the_install_command(module: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"finetune-qlora\[export\]"):
        runtime()


@pytest.fixture(scope="module")
def graphs(repo_root: Path, tmp_path_factory: pytest.TempPathFactory):
    onnx = pytest.importorskip("onnx", reason='needs pip install "finetune-qlora[export]"')
    for module in ("onnx_ir", "onnxruntime", "onnxruntime_genai"):
        pytest.importorskip(module, reason='needs pip install "finetune-qlora[export]"')
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
