"""Deterministic kernels are on where a run asks for them, and torch's own setting comes back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from finetune.ops import determinism, dispatch
from finetune.ops.determinism import cumulative_sums, deterministic, fix_backward


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    device = torch.device("cuda")


def test_torchs_setting_comes_back_after_an_error_in_a_backward_pass():
    seen = []

    def fail(_: torch.Tensor) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise MemoryError

    x = torch.ones(2, requires_grad=True).as_subclass(OnGpu)
    with pytest.raises(MemoryError), deterministic(True):
        y = fix_backward(x * 2)
        y.grad_fn.register_prehook(fail)
        y.sum().backward()
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert not determinism.STATE.on


@pytest.mark.parametrize(("wanted", "kind"), [(False, OnGpu), (True, torch.Tensor)])
def test_nothing_changes_without_the_setting_or_on_a_cpu(monkeypatch, wanted, kind):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: pytest.fail("switched on"))
    x = torch.ones(2, requires_grad=True).as_subclass(kind)
    with deterministic(wanted):
        fix_backward(x * 2).sum().backward()


def test_kernels_of_a_deterministic_run_are_compiled_without_measurements(monkeypatch):
    options = []

    def compiling(function, **settings):
        options.append(settings["options"])
        return function

    monkeypatch.setattr(dispatch, "STATE", SimpleNamespace(compiled=True, failed=set()))
    monkeypatch.setattr(torch, "compile", compiling)
    kernel = dispatch.fused(lambda x_N: x_N + 1)
    for wanted in (False, True, True, False):
        with deterministic(wanted):
            kernel(torch.ones(2))
    assert options == [None, {"deterministic": True}]


@pytest.mark.parametrize("shape", [(1, 5), (5,), (1, 1, 5), (3, 5)])
def test_cumulative_sums_of_a_single_row_on_a_gpu_are_those_of_several(shape):
    torch.manual_seed(0)
    values = torch.rand(shape, dtype=torch.float64)
    assert torch.equal(cumulative_sums(values.as_subclass(OnGpu)).as_subclass(torch.Tensor), values.cumsum(-1))
