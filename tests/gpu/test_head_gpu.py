"""The loss on a GPU: logits of a bf16 head are fp32, and the kernels compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finetune.losses.chunked import chunked_loss
from finetune.losses.cross_entropy import _nats_of
from finetune.ops import dispatch
from finetune.ops.limits import LOGITS_VALUES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient_equal_float64(compiled, dtype, bias, monkeypatch):
    torch.manual_seed(0)
    rows, width, vocabulary = 301, 256, 5003
    monkeypatch.setitem(LOGITS_VALUES, "gpu", 64 * vocabulary)
    head = torch.nn.Linear(width, vocabulary, bias=bias, device="cuda", dtype=dtype).requires_grad_(False)
    hidden = (4 * torch.randn(rows, width, device="cuda")).to(dtype)
    labels, weights = torch.randint(vocabulary, (rows,), device="cuda"), torch.rand(rows, device="cuda")
    exact = hidden.double().requires_grad_()
    logits = F.linear(exact, head.weight.double(), None if head.bias is None else head.bias.double())
    expected = (F.cross_entropy(logits, labels, reduction="none") * weights.double()).sum()
    expected.backward()
    leaf = hidden.clone().requires_grad_()
    try:
        dispatch.configure_compile(torch.device("cuda"), 0, wanted=compiled)
        assert dispatch.STATE.compiled == compiled
        nats = chunked_loss(leaf, head, vocabulary, _nats_of(labels, weights))
    finally:
        dispatch.configure_compile(torch.device("cuda"), 0, wanted=False)
    nats.backward()
    # Sums of fp32 products; a logit rounded to bf16 would show as 1e-3 and more in a single row.
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5)
    error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < (2**-8 if dtype == torch.bfloat16 else 1e-5)
