from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.data.documents import Document
from finetune.export.gguf.quantized import importance_matrix
from finetune.export.gguf.quantizer import read_imatrix
from tests.models import random_qwen2

gguf = pytest.importorskip("gguf", reason="needs the export extra")

LENGTHS = (5, 70, 1, 33)
OURS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def documents() -> list[Document]:
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, 97, length).astype(np.int32) for length in LENGTHS]
    return [Document(each, np.roll(each, -1), f"rows:{number}") for number, each in enumerate(ids)]


def reference(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the mean squared inputs of every linear layer, one document at a time, by transformers alone."""
    inputs: dict[str, list[torch.Tensor]] = {}
    for layer, block in enumerate(model.model.layers):
        for name, module in block.named_modules():
            if (last := name.rpartition(".")[2]) in OURS:
                key = f"blk.{layer}.{OURS[last]}.weight"
                module.register_forward_hook(
                    lambda _, given, __, key=key: inputs.setdefault(key, []).append(given[0][0])
                )
    with torch.no_grad():
        for document in documents():
            model(input_ids=torch.tensor(document.ids[None]))
    return {name: torch.cat(parts).square().mean(0) for name, parts in inputs.items()}


def test_it_is_the_mean_square_of_the_inputs_of_every_linear_layer():
    wanted = reference(random_qwen2("sdpa", torch.float64))
    found = importance_matrix(random_qwen2("sdpa", torch.float64), documents())
    assert found.tokens == sum(LENGTHS) and found.sums.keys() == wanted.keys() and len(wanted) == 14
    for name, sums in found.sums.items():
        torch.testing.assert_close(sums / found.tokens, wanted[name], rtol=1e-12, atol=0)


def test_the_model_keeps_no_hook():
    model = random_qwen2("sdpa")
    importance_matrix(model, documents())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_file_has_llama_cpps_format(tmp_path: Path):
    found = importance_matrix(random_qwen2("sdpa", torch.float64), documents())
    found.write(tmp_path / "imatrix.gguf", "rows")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    keys = ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    assert [reader.get_field(key).contents() for key in keys] == ["imatrix", ["rows"], 1, 109]
    shapes = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight.in_sum2"] == ("F32", [128, 1])
    assert shapes["blk.1.ffn_down.weight.counts"] == ("F32", [1, 1])
    means = read_imatrix(tmp_path / "imatrix.gguf")
    assert means.keys() == found.sums.keys()
    for name, mean in means.items():
        np.testing.assert_allclose(mean, found.sums[name].numpy() / 109, rtol=1e-6)
