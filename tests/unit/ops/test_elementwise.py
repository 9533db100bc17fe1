"""Elementwise kernels equal transformers in float64, and compiled equals plain."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from finetune.ops import dispatch, elementwise

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}


def gradients(function, inputs: list[torch.Tensor], direction: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, direction.to(y.dtype)))


def check(found, expected, relative: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and (a.double() - b.double()).abs().max() <= relative * b.abs().max()


@pytest.mark.parametrize(("dtype", "relative"), DTYPES.items())
@pytest.mark.parametrize("tokens", [1, 13])
def test_rms_norm(dtype, relative, tokens):
    torch.manual_seed(0)
    x, direction = 30 * torch.randn(tokens, 96).to(dtype), torch.randn(tokens, 96).to(dtype)
    norm = Qwen2RMSNorm(96, 1e-6).double()
    norm.weight.data = (1 + 0.5 * torch.randn(96)).to(dtype).double()
    weight = norm.weight.detach()
    # transformers computes in fp32 whatever it is given; the formula in float64:
    exact = gradients(
        lambda x: weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), [x.double()], direction
    )
    ours = gradients(lambda x: elementwise.rms_norm(x, weight.to(dtype), 1e-6), [x], direction)
    check(ours, exact, relative)
    assert torch.equal(ours[0], norm.to(dtype)(x).detach())


@pytest.mark.parametrize(("dtype", "relative"), DTYPES.items())
def test_rotary_embedding(dtype, relative):
    torch.manual_seed(0)
    x, direction = (torch.randn(9, 3, 16).to(dtype) for _ in range(2))
    angles = torch.rand(9, 8).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def peers(x: torch.Tensor) -> torch.Tensor:
        rows = x.transpose(0, 1)[None]
        return apply_rotary_pos_emb(rows, rows, cos.to(x.dtype)[None], sin.to(x.dtype)[None])[0][0].transpose(0, 1)

    ours = gradients(lambda x: elementwise.apply_rope(x, cos, sin), [x], direction)
    check(ours, gradients(peers, [x.double()], direction), relative)
    assert torch.equal(ours[0], peers(x))


@pytest.mark.parametrize(("dtype", "relative"), DTYPES.items())
def test_swiglu(dtype, relative):
    torch.manual_seed(0)
    gate, up, direction = ((4 * torch.randn(11, 40)).to(dtype) for _ in range(3))
    expected = gradients(lambda g, u: F.silu(g) * u, [gate.double(), up.double()], direction)
    product = elementwise.swiglu_forward(gate, up)
    assert torch.equal(product, F.silu(gate) * up) or dtype == torch.float32
    before = direction.clone()
    elementwise.swiglu_backward_(direction, gate, up)
    check((product, gate, up), expected, relative)
    assert torch.equal(direction, before)


def test_compiled_equals_plain_and_autograd_sees_overwritten_tensors(monkeypatch: pytest.MonkeyPatch):
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(dispatch.STATE, "compiled", True)
    torch.manual_seed(0)
    for tokens in (64, 7):
        tensors = [torch.randn(tokens, 48).bfloat16() for _ in range(3)]
        copies = [t.clone() for t in tensors]
        versions = [t._version for t in tensors]
        elementwise.swiglu_backward_(*tensors)
        elementwise.swiglu_backward_.plain(*copies)
        check(tensors, copies, 8e-3)
        assert [t._version > v for t, v in zip(tensors, versions, strict=True)] == [False, True, True]
        weight = torch.randn(48).bfloat16()
        check(
            [elementwise.rms_norm(copies[0], weight, 1e-6)],
            [elementwise.rms_norm_forward.plain(copies[0], weight, 1e-6)],
            8e-3,
        )
