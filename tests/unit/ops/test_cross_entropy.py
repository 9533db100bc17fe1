"""Cross-entropy equals float64, at critical sizes and magnitudes."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
import torch.nn.functional as F

from finetune.ops import dispatch
from finetune.ops.cross_entropy import _cross_entropy_rows_, cross_entropy_
from finetune.ops.limits import SOFTMAX_BLOCK_VALUES


def reference(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats and the weighted sum's gradient in float64."""
    leaf = logits.double().requires_grad_()
    nats = F.cross_entropy(leaf, labels, reduction="none")
    (gradient,) = torch.autograd.grad((nats * weights.double()).sum(), leaf)
    return nats.detach(), gradient


def check(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> None:
    ones = torch.ones(len(labels), device=logits.device)
    nats, gradient = reference(logits, labels, ones if weights is None else weights)
    found = cross_entropy_(logits, labels, weights)
    torch.testing.assert_close(found.double(), nats, rtol=1e-5, atol=1e-6)
    # The gradient is rounded once to the logits' dtype: half of its last place, relative to each value by itself; and
    # the fp32 sum of exponentials, 1 and more, once to 2**-24.
    last_place = 2**-8 if logits.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits.double(), gradient, rtol=last_place, atol=1.2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 97), (1, 97), (1, 1), (7, 1009), (12, 131), (13, 131)])
@pytest.mark.parametrize("weighted", [False, True])
def test_nats_and_gradients_equal_float64(dtype, rows, vocabulary, weighted, monkeypatch):
    monkeypatch.setitem(SOFTMAX_BLOCK_VALUES, "cpu", 3 * 131)  # blocks of 3 rows of 131: also full and broken ones
    torch.manual_seed(rows)
    logits = (5 * torch.randn(rows, vocabulary)).to(dtype)
    weights = torch.tensor([0.0, 1.0, 0.25, 3.0])[torch.arange(rows) % 4] if weighted else None
    check(logits, torch.randint(vocabulary, (rows,)), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 97), (1, 97), (1, 1), (13, 131)])
def test_the_kernel_of_a_gpu_equals_float64(dtype, rows, vocabulary):
    torch.manual_seed(rows)
    logits, labels = 5 * torch.randn(rows, vocabulary), torch.randint(vocabulary, (rows,))
    weights = torch.tensor([0.0, 1.0, 0.25, 3.0])[torch.arange(rows) % 4]
    nats, expected = reference(logits, labels, weights)
    gradient = torch.empty(rows, vocabulary, dtype=dtype)
    found = _cross_entropy_rows_(logits, labels, weights, gradient)
    torch.testing.assert_close(found.double(), nats, rtol=1e-5, atol=1e-6)
    last_place = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), expected, rtol=last_place, atol=1.2e-7)


def test_huge_logits_do_not_overflow_and_a_certain_label_keeps_its_gradient():
    logits = torch.full((4, 50), -1e30)
    logits[0, 3], logits[1, 3], logits[2, 3] = 1e30, 1e4, 80.0
    labels = torch.tensor([3, 4, 3, 7])
    nats = cross_entropy_(logits, labels)
    assert nats[0] == 0 and nats[1] == pytest.approx(1e30) and nats[3] == pytest.approx(torch.tensor(50.0).log())
    assert logits.isfinite().all() and logits[1, 4] == -1 and logits[1, 3] == 1
    for dtype in (torch.float32, torch.bfloat16):
        sure = torch.zeros(1, 50, dtype=dtype)
        sure[0, 0] = 12.0  # probability 1 - 3e-4: in bf16, softmax less one would be 0
        check(sure, torch.tensor([0]), None)


def test_compiled_equals_plain(caplog):
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("needs a C++ compiler, which this machine lacks")
    torch.manual_seed(0)
    logits = 5 * torch.randn(6, 301).bfloat16()
    labels, weights = torch.randint(301, (6,)), torch.rand(6)
    plain = logits.clone()
    expected = cross_entropy_(plain, labels, weights)
    try:
        dispatch.configure_compile(torch.device("cpu"), 0, wanted=True)
        with caplog.at_level(logging.WARNING):
            found = cross_entropy_(logits, labels, weights)
    finally:
        dispatch.configure_compile(torch.device("cpu"), 0, wanted=False)
    assert not caplog.records  # it did not fall back
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, plain, rtol=2**-7, atol=1.2e-7)  # one rounding of bf16 may fall the other way
