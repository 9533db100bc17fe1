"""Fused layers on a GPU: the attention kernel, the 4-bit buffer, the compiled kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.data.batch import build_batch
from finetune.models.adapters.attach import attach_lora
from finetune.models.fused import fuse_layers
from finetune.models.load import load_base
from finetune.ops import dispatch
from finetune.ops.attention import attend, plan_segments, round_up
from tests.models import random_qwen2
from tests.parity.test_cross_entropy import documents
from tests.parity.test_fused_layers import LENGTHS, disturb, step
from tests.unit.ops.test_attention import reference

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("common", [0, 60])
def test_attention_equals_float64(dtype: torch.dtype, common: int):
    torch.manual_seed(0)
    first, used, documents_ = torch.arange(130), 130, [torch.arange(130)]
    for length in (70, 1, 300):
        shared = min(common, length)
        documents_.append(torch.cat([first[:shared], torch.arange(used, used + length - shared)]))
        used += length - shared
    padded = round_up(used)
    rows = [torch.randn(padded, heads, 64, dtype=dtype, device=GPU).requires_grad_() for heads in (8, 2, 2)]
    segments = plan_segments([len(d) for d in documents_], torch.cat(documents_), padded, GPU, dtype).to(GPU)
    # torch 2.11 is the oldest supported version, and has the kernel.
    flash = dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0) and not torch.version.hip
    assert (segments.cumulative is not None) == flash
    output = attend(*rows, segments, 0.125)
    wide = [x.detach().double().requires_grad_() for x in rows]
    relative = 2e-2 if dtype == torch.bfloat16 else 1e-4
    seen = torch.zeros(padded, dtype=torch.bool, device=GPU)
    total, direction = torch.zeros((), dtype=torch.float64, device=GPU), torch.randn(padded, 8, 64, device=GPU)
    direction[used:] = 0
    for document, part in zip(documents_, reference(wide, [d.to(GPU) for d in documents_], 0.125), strict=True):
        assert (output[document.to(GPU)] - part).abs().max() <= relative * part.abs().max()
        total = total + (part * direction[document.to(GPU)] * ~seen[document.to(GPU)][:, None, None]).sum()
        seen[document.to(GPU)] = True
    found = torch.autograd.grad(output, rows, direction.to(dtype))
    for a, b in zip(found, torch.autograd.grad(total, wide), strict=True):
        assert (a - b).abs().max() <= relative * b.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("storage", ["nf4", "resident", "none"])
def test_gradients_are_as_close_to_fp32_as_those_of_peft(
    tmp_path: Path, storage: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
):
    """At most 25 % further from fp32 arithmetic than PEFT, as on the CPU."""
    assert dispatch.compile_problem(GPU) is None
    monkeypatch.setattr(dispatch.STATE, "compiled", compiled)
    random_qwen2(dtype=torch.bfloat16).save_pretrained(tmp_path)
    batch = build_batch(documents(LENGTHS))

    def gradients(dtype: str, fused: bool) -> dict[str, torch.Tensor]:
        quant_type = "none" if storage == "none" else "nf4"
        quant = QuantConfig(type=quant_type, compute_dtype=dtype, cache=False, keep_dequantized=storage == "resident")
        model = attach_lora(load_base(ModelConfig(name=str(tmp_path), dtype=dtype), quant), LoraConfig(rank=4))
        disturb(model)
        if fused:
            fuse_layers(model)
        return step(model.train(), batch)[1]

    exact, peers, ours = gradients("float32", False), gradients("bfloat16", False), gradients("bfloat16", True)

    def distance(found: dict[str, torch.Tensor]) -> float:
        squares = [((g - exact[n]).square().sum() / exact[n].square().sum()).item() for n, g in found.items()]
        return (sum(squares) / len(squares)) ** 0.5

    assert distance(ours) <= 1.25 * distance(peers) + 1e-6
