"""Kernels run compiled or plain, whole or in blocks of rows, with the same values."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from finetune.ops import attention, cross_entropy, dispatch, divergence, elementwise

CPU = torch.device("cpu")
# Arguments of each kernel, with 7 rows; letters as in ops/.
KERNELS = {
    elementwise.rms_norm_forward: ("TD", "D", 1e-6),
    elementwise.rms_norm_backward: ("TD", "TD", "D", 1e-6),
    elementwise.swiglu_forward: ("TD", "TD"),
    elementwise.swiglu_backward_: ("TD", "TD", "TD"),
    elementwise.apply_rope_forward: ("THD", "TD", "TD"),
    elementwise.apply_rope_backward: ("THD", "TD", "TD"),
    cross_entropy._softmax_rows_: ("TD", "T"),
    **{kernel: ("TD", "TD", "T", 0.3, 1.0) for kernel in divergence.DIVERGENCES.values()},
}
# D is T, so that a weight [D] has as many values as there are rows. Rows are whole vectors, two of 16 values under
# AVX-512: sigmoid of the values after the last whole vector has other last bits.
SIZES = {"T": 32, "D": 32, "H": 3}


@pytest.fixture
def failures(monkeypatch):
    """Compile kernels in this test, and forget its failures afterwards."""
    monkeypatch.setattr(dispatch.STATE, "compiled", True)
    monkeypatch.setattr(dispatch.STATE, "failed", set())
    yield dispatch.STATE.failed
    dispatch.compile_problem.cache_clear()


def no_compiler(function, **_):
    def call(*args):
        raise RuntimeError("no compiler\nand a long trace")

    return call


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_kernel_in_blocks_of_rows_gives_the_same_bits(kernel):
    torch.manual_seed(0)
    whole = [torch.randn([SIZES[x] for x in kind]) if isinstance(kind, str) else kind for kind in KERNELS[kernel]]
    blocks = [x.clone() if isinstance(x, torch.Tensor) else x for x in whole]
    expected = kernel.plain(*whole)
    found = dispatch.run_in_blocks(kernel.plain, dispatch.arguments_by_row(kernel.plain), 3, *blocks)
    assert type(found) is type(expected)
    results = [(found, expected)] if isinstance(found, torch.Tensor) else zip(found or (), expected or (), strict=True)
    for a, b in [*results, *zip(blocks, whole, strict=True)]:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_arguments_have_rows_by_the_letters_of_their_names():
    assert dispatch.arguments_by_row(elementwise.rms_norm_backward.plain) == {0, 1}
    assert dispatch.arguments_by_row(elementwise.apply_rope_forward.plain) == {0, 1, 2}
    assert dispatch.arguments_by_row(cross_entropy._softmax_rows_.plain) == {0, 1}
    assert dispatch.arguments_by_row(attention._softmax_backward.plain) == frozenset()


def test_a_kernel_that_cannot_be_compiled_runs_plain_and_is_named(failures, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", no_compiler)

    @dispatch.fused
    def add_one(x_N: torch.Tensor) -> torch.Tensor:
        return x_N + 1

    with caplog.at_level(logging.WARNING):
        assert add_one(torch.zeros(3)).tolist() == add_one(torch.zeros(3)).tolist() == [1, 1, 1]
    assert failures == {"add_one"} and len(caplog.records) == 1


def test_a_gpu_that_compiles_nothing_gets_plain_kernels_with_the_reason(failures, monkeypatch):
    # The meta device stands for a GPU: no C++ compiler is looked for, and a kernel is compiled.
    monkeypatch.setattr(torch, "compile", no_compiler)
    line = dispatch.configure_compile(torch.device("meta"), 1e30)
    assert not dispatch.STATE.compiled and line.startswith("compile: off") and line.count("no compiler") == 1
    assert "\n" not in line


def test_any_number_of_rows_is_one_graph_and_each_width_another():
    """As kernels are compiled for a GPU."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    kernel = elementwise.swiglu_forward.plain
    compiled = torch.compile(kernel, dynamic=False, fullgraph=True, backend=graphs)
    for rows in (5, 64, 7, 128):
        for width in (8, 16):
            args = [torch.randn(rows, width) for _ in range(2)]
            dispatch.mark_rows(dispatch.arguments_by_row(kernel), args)
            compiled(*args)
    assert graphs.frame_count == 2
