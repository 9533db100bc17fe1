"""Chunked losses: the same sum and gradients for any chunk size, in the memory of one chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.losses.chunked import chunked_logits, chunked_loss, target_nats
from finetune.losses.cross_entropy import _nats_of
from finetune.ops.limits import LOGITS_VALUES

D, V = 16, 211


class HeadWithLora(nn.Module):
    """A frozen matrix with a trained low-rank update, like in PEFT."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(3, D))
        self.b = nn.Parameter(torch.randn(base.out_features, 3))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + (hidden.to(self.a.dtype) @ self.a.T @ self.b.T).to(hidden.dtype)


def head_of_kind(kind: str) -> nn.Module:
    torch.manual_seed(1)
    head = nn.Linear(D, V, bias=kind == "bias").requires_grad_(kind == "trained")
    if kind == "hooked":
        head.register_forward_hook(lambda module, arguments, logits: logits * 2)
    return HeadWithLora(head) if kind == "lora" else head


def forward_kl(teacher_NV: Tensor):
    """Return KL(teacher || student) as a chunk loss."""

    def loss(logits_NV: Tensor, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        log_student = torch.log_softmax(logits_NV.float(), -1)
        log_teacher = torch.log_softmax(teacher_NV[rows], -1)
        nats = (log_teacher.exp() * (log_teacher - log_student)).sum()
        return nats, log_student.exp() - log_teacher.exp()

    return loss


def reference_kl(hidden: Tensor, head: nn.Module, teacher: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaf = hidden.double().requires_grad_()
    head = head.double()
    log_student = torch.log_softmax(head(leaf), -1)
    log_teacher = torch.log_softmax(teacher.double(), -1)
    nats = (log_teacher.exp() * (log_teacher - log_student)).sum()
    leaves = [leaf, *(p for p in head.parameters() if p.requires_grad)]
    return nats.detach(), list(torch.autograd.grad(nats, leaves))


@pytest.mark.parametrize("kind", ["frozen", "bias", "hooked", "trained", "lora"])
@pytest.mark.parametrize(("rows", "limit"), [(1, 1), (7, 3 * V), (12, 3 * V), (12, 12 * V), (13, 2**20)])
def test_a_divergence_and_its_gradients_equal_float64_over_the_full_vocabulary(kind, rows, limit, monkeypatch):
    monkeypatch.setitem(LOGITS_VALUES, "cpu", limit)
    torch.manual_seed(0)
    hidden, teacher = torch.randn(rows, D), 2 * torch.randn(rows, V)
    expected, gradients = reference_kl(hidden, head_of_kind(kind), teacher)
    head = head_of_kind(kind)
    leaf = hidden.clone().requires_grad_()
    nats = chunked_loss(leaf, head, V, forward_kl(teacher))
    (nats * 0.25).backward()
    torch.testing.assert_close(nats.detach().double(), expected, rtol=1e-6, atol=1e-6)
    found = [leaf.grad, *(p.grad for p in head.parameters() if p.requires_grad)]
    for gradient, exact in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient.double() * 4, exact, rtol=1e-5, atol=2e-5)  # sums of V fp32 terms


@pytest.mark.parametrize("kind", ["frozen", "bias", "trained", "lora"])
def test_no_rows_give_a_loss_and_gradients_of_zero(kind):
    head = head_of_kind(kind)
    hidden = torch.randn(5, D, requires_grad=True)
    nats = chunked_loss(hidden[:0], head, V, _nats_of(torch.empty(0, dtype=torch.int64), None))
    nats.backward()
    assert nats.item() == 0.0
    trained = [p for p in head.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in (hidden, *trained))
    assert not list(chunked_logits(hidden[:0], head, V))


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("kind", ["frozen", "bias"])
def test_in_bf16_only_the_two_matmuls_round(kind):
    torch.manual_seed(0)
    head = head_of_kind(kind).bfloat16()
    hidden, labels = torch.randn(30, D).bfloat16(), torch.randint(V, (30,))
    leaf = hidden.clone().requires_grad_()
    nats = chunked_loss(leaf, head, V, _nats_of(labels, None))
    nats.backward()
    exact = hidden.double().requires_grad_()
    logits = nn.functional.linear(exact, head.weight.double(), None if head.bias is None else head.bias.double())
    expected = nn.functional.cross_entropy(logits, labels, reduction="sum")
    expected.backward()
    # A logit is off by at most 2**-9 of itself, at random: far less in the sum of 30.
    assert nats.item() == pytest.approx(expected.item(), rel=2**-9)
    error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 2**-8


class LargestTensor(TorchDispatchMode):
    """Record the size of the largest storage that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.values = max(self.values, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("kind", ["frozen", "bias", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits(kind, dtype, monkeypatch):
    rows = 20 * D  # so that neither hidden states nor the head outweigh the chunk
    monkeypatch.setitem(LOGITS_VALUES, "cpu", 2 * D * V)
    head = head_of_kind(kind).to(dtype)
    hidden = torch.randn(rows, D, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (rows,))
    with LargestTensor() as largest:
        chunked_loss(hidden, head, V, _nats_of(labels, torch.rand(rows))).backward()
        for logits, chunk in chunked_logits(hidden, head, V):
            assert len(logits) == chunk.stop - chunk.start
    assert largest.values == 2 * D * V < rows * V


class CountingRound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, master: Tensor) -> Tensor:
        self.calls += 1
        return master.bfloat16()


def test_a_trained_copy_with_fp32_masters_is_rounded_once_however_many_chunks(monkeypatch):
    monkeypatch.setitem(LOGITS_VALUES, "cpu", 3 * V)
    head = head_of_kind("trained")
    rounding = CountingRound()
    parametrize.register_parametrization(head, "weight", rounding, unsafe=True)
    head.bias = None
    hidden, labels = torch.randn(12, D).bfloat16(), torch.randint(V, (12,))
    rounding.calls = 0
    chunked_loss(hidden, head, V, _nats_of(labels, None)).backward()
    assert rounding.calls == 1
    master = head.parametrizations.weight.original
    exact = master.detach().bfloat16().double().requires_grad_()
    nn.functional.cross_entropy(hidden.double() @ exact.T, labels, reduction="sum").backward()
    assert master.grad.dtype == torch.float32
    assert (master.grad - exact.grad).norm() < 2**-7 * exact.grad.norm()


@pytest.mark.parametrize("kind", ["frozen", "bias", "hooked", "trained", "lora"])
def test_nats_of_each_target_have_the_gradients_of_float64(monkeypatch, kind):
    """Whatever function of the nats is minimized, and for any chunk size."""
    monkeypatch.setitem(LOGITS_VALUES, "cpu", 5 * V)
    head, labels = head_of_kind(kind), torch.randint(V, (13,))
    hidden = torch.randn(13, D, requires_grad=True)
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    found = target_nats(hidden, head, V, labels)
    gradients = torch.autograd.grad(found.square().sum(), inputs)
    exact_head, exact = head_of_kind(kind).double(), hidden.detach().double().requires_grad_()
    expected = nn.functional.cross_entropy(exact_head(exact), labels, reduction="none")
    exact_inputs = [exact, *(p for p in exact_head.parameters() if p.requires_grad)]
    torch.testing.assert_close(found, expected.float())
    for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), exact_inputs), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5 * b.abs().max().item())
