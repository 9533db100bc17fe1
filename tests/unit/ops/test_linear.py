"""Frozen linear layers with adapters equal float64 autograd: values and all gradients."""

from __future__ import annotations

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.ops import linear, lora
from finetune.ops.linear import Projection, project, swiglu_mlp
from finetune.ops.lora import Adapter

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def projection(
    outputs: int, inputs: int, rank: int | None, dtype: torch.dtype, bias: bool = False, quant_type: str | None = None
) -> Projection:
    weight = torch.randn(outputs, inputs).to(dtype) / inputs**0.5
    state = None
    if quant_type is not None:
        weight, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=True)
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    adapter = rank and Adapter(
        torch.randn(rank, inputs, dtype=masters).div_(inputs**0.5).requires_grad_(),
        torch.randn(outputs, rank, dtype=masters).requires_grad_(),
        1.5,
    )
    return Projection(weight, torch.randn(outputs).to(dtype) if bias else None, state, adapter or None)


def reference(x: torch.Tensor, p: Projection) -> torch.Tensor:
    """Compute the formula in float64 with the weights dequantized by bitsandbytes."""
    weight = p.weight if p.quant_state is None else bnb.dequantize_4bit(p.weight, p.quant_state)
    y = F.linear(x, weight.double(), None if p.bias is None else p.bias.double())
    if p.adapter:
        y = y + p.adapter.scale * (x @ p.adapter.a.double().T @ p.adapter.b.double().T)
    return y


def check(outputs, expected, leaves: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Compare values and gradients for a random direction, relative to the largest value of each tensor."""
    directions = [torch.randn_like(y).to(dtype) for y in expected]
    found = torch.autograd.grad(outputs, leaves, [d.to(y.dtype) for d, y in zip(directions, outputs, strict=True)])
    wanted = torch.autograd.grad(expected, leaves, [d.double() for d in directions])
    for a, b in zip((*outputs, *found), (*expected, *wanted), strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * b.abs().max().clamp_min(1e-3)


def leaves_of(x: torch.Tensor, *projections: Projection) -> list[torch.Tensor]:
    return [x, *(factor for p in projections if p.adapter for factor in p.adapter.trained)]


def freeze(*projections: Projection) -> None:
    for p in projections:
        if p.adapter:
            p.adapter.a.requires_grad_(False)


@pytest.fixture
def shared_products(monkeypatch):
    """Let adapters on one input share their products, as on a GPU."""
    monkeypatch.setattr(lora, "_shares_products", lambda device: True)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 33)])
@pytest.mark.parametrize("ranks", [(4, None, 1), (None, None, None), (1, 2, 3), (None, 8, None)])
@pytest.mark.parametrize("bias", [False, True])
def test_projections_of_one_input_equal_float64(dtype, shape, ranks, bias):
    torch.manual_seed(sum(shape))
    x = torch.randn(*shape, 48).to(dtype).requires_grad_()
    layers = [projection(outputs, 48, rank, dtype, bias) for outputs, rank in zip((40, 8, 24), ranks, strict=True)]
    check(project(x, layers), [reference(x.double(), p) for p in layers], leaves_of(x, *layers), dtype)


@pytest.mark.usefixtures("sixteen_bit_products", "shared_products")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(4, None, 1), (1, 2, 3), (None, 8, None)])
@pytest.mark.parametrize("scales", [(1.5, 1.5, 1.5), (0.7, 1.5, 0.7)])
def test_adapters_that_share_products_equal_float64(dtype, ranks, scales):
    torch.manual_seed(0)
    x = torch.randn(19, 48).to(dtype).requires_grad_()
    layers = [projection(outputs, 48, rank, dtype) for outputs, rank in zip((40, 8, 24), ranks, strict=True)]
    layers = [
        replace(p, adapter=p.adapter and replace(p.adapter, scale=scale))
        for p, scale in zip(layers, scales, strict=True)
    ]
    adapters = [p.adapter for p in layers]
    with torch.no_grad():
        stacks = lora.stack_adapters(adapters, [None] * 3, dtype)
    assert len(stacks) == len({adapter.scale for adapter in adapters if adapter})
    outputs = project(x, layers)
    check(outputs, [reference(x.double(), p) for p in layers], leaves_of(x, *layers), dtype)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(None, None, None), (2, None, None), (None, 3, None), (None, None, 4), (1, 1, 1)])
@pytest.mark.parametrize("most_rows", [64, 16])
@pytest.mark.parametrize("shared", [False, True])
def test_the_gated_mlp_equals_float64(dtype, ranks, most_rows, shared, monkeypatch):
    """45 rows, at once and in blocks with a shorter last one."""
    monkeypatch.setattr(lora, "_shares_products", lambda device: shared)
    monkeypatch.setattr(linear, "MLP_ROWS", most_rows)
    torch.manual_seed(0)
    x = torch.randn(5, 9, 32).to(dtype).requires_grad_()
    gate, up, down = (
        projection(o, i, r, dtype) for (o, i), r in zip(((80, 32), (80, 32), (32, 80)), ranks, strict=True)
    )
    wide = x.double()
    expected = reference(F.silu(reference(wide, gate)) * reference(wide, up), down)
    check([swiglu_mlp(x, gate, up, down)], [expected], leaves_of(x, gate, up, down), dtype)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bit_weights_equal_those_of_bitsandbytes(dtype):
    torch.manual_seed(3)
    x = torch.randn(17, 64).to(dtype).requires_grad_()
    layers = [projection(96, 64, 2, dtype, True, "nf4"), projection(32, 64, None, dtype, False, "nf4")]
    check(project(x, layers), [reference(x.double(), p) for p in layers], leaves_of(x, *layers), dtype)


def test_the_input_is_saved_once_and_only_with_an_adapter():
    kept: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    x = torch.randn(6, 48, requires_grad=True)
    for ranks, expected in (((None, None, None), 0), ((4, None, 2), 1)):
        kept.clear()
        layers = [projection(16, 48, rank, torch.float32) for rank in ranks]
        with hooks:
            project(x, layers)
        assert [t.shape for t in kept] == [x.shape] * expected
    freeze(*layers)
    kept.clear()
    with hooks:
        project(x, layers)
    assert [tuple(t.shape) for t in kept] == [(6, 4), (6, 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(4, None, 1), (1, 2, 3)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("number", [1, 3])
def test_projections_with_some_frozen_a_equal_float64(dtype, ranks, shared, number, monkeypatch):
    monkeypatch.setattr(lora, "_shares_products", lambda device: shared)
    torch.manual_seed(0)
    x = torch.randn(19, 48).to(dtype).requires_grad_()
    layers = [projection(outputs, 48, rank, dtype) for outputs, rank in zip((40, 8, 24), ranks, strict=True)]
    freeze(*layers[:number])
    check(project(x, layers), [reference(x.double(), p) for p in layers], leaves_of(x, *layers), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(2, None, None), (None, 3, None), (None, None, 4), (1, 2, 1)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tile_rows", [None, 16])
@pytest.mark.parametrize("number", [1, 3])
def test_a_gated_mlp_with_some_frozen_a_equals_float64(dtype, ranks, shared, tile_rows, number, monkeypatch):
    monkeypatch.setattr(lora, "_shares_products", lambda device: shared)
    monkeypatch.setattr(linear, "MLP_TILES", 1000)
    torch.manual_seed(0)
    x = torch.randn(5, 9, 32).to(dtype).requires_grad_()
    layers = [projection(o, i, r, dtype) for (o, i), r in zip(((80, 32), (80, 32), (32, 80)), ranks, strict=True)]
    freeze(*layers[-number:])
    gate, up, down = layers
    wide = x.double()
    expected = reference(F.silu(reference(wide, gate)) * reference(wide, up), down)
    check([swiglu_mlp(x, *layers, tile_rows)], [expected], leaves_of(x, *layers), dtype)


def test_an_input_without_gradient_costs_no_matmul_with_the_frozen_weight():
    layer = projection(16, 48, 2, torch.float32)
    x = torch.randn(6, 48)
    (y,) = project(x, [layer])
    grads = torch.autograd.grad(y.sum(), leaves_of(x, layer)[1:])
    expected = torch.autograd.grad(reference(x.double(), layer).sum(), leaves_of(x, layer)[1:])
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert y.grad_fn is not None and not x.requires_grad


@pytest.mark.parametrize("frozen", [False, True])
def test_dropout_equals_that_of_torch(frozen):
    p = 0.4
    layer = projection(16, 48, 2, torch.float64)
    assert layer.adapter is not None
    if frozen:
        freeze(layer)
    dropped = Projection(layer.weight, None, None, Adapter(layer.adapter.a, layer.adapter.b, 1.5, p))
    x = torch.randn(30, 48, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    outputs = project(x, [dropped])
    torch.manual_seed(5)
    seen = F.dropout(x, p)
    expected = F.linear(x, layer.weight) + 1.5 * (seen @ layer.adapter.a.T @ layer.adapter.b.T)
    check(outputs, [expected], leaves_of(x, dropped), torch.float64)


def test_factors_changed_without_a_new_version_are_used():
    """The optimizers of bitsandbytes write so."""
    layer = projection(16, 48, 2, torch.bfloat16)
    assert layer.adapter is not None
    x, version = torch.randn(5, 48).bfloat16(), layer.adapter.b._version
    before = project(x, [layer])[0]
    layer.adapter.b.detach().numpy()[:] = 3.0
    assert layer.adapter.b._version == version
    assert not torch.equal(project(x, [layer])[0], before)


class WidestResult(TorchDispatchMode):
    """Record the most rows of any result with a given number of columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (self.columns,):
            self.rows = max(self.rows, result.numel() // self.columns)
        return result


@pytest.mark.parametrize("rank", [None, 2])
def test_with_gradients_no_mlp_matrix_has_more_rows_than_a_block(rank, monkeypatch):
    monkeypatch.setattr(linear, "MLP_ROWS", 8)
    gate, up, down = (projection(*shape, rank, torch.float32) for shape in ((80, 6), (80, 6), (6, 80)))
    x = torch.randn(27, 6, requires_grad=True)
    with WidestResult(80) as widest:
        swiglu_mlp(x, gate, up, down).sum().backward()
    assert widest.rows == 8


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_an_mlp_runs_in_blocks_and_returns_the_same(dtype, monkeypatch):
    monkeypatch.setattr(linear, "MLP_FORWARD_ROWS", 8)
    torch.manual_seed(2)
    layers = [projection(*shape, 2, dtype) for shape in ((80, 6), (80, 6), (6, 80))]
    x = torch.randn(3, 9, 6).to(dtype)
    with WidestResult(80) as widest:
        expected = swiglu_mlp(x, *layers).detach()
    assert widest.rows == 27
    with torch.no_grad(), WidestResult(80) as widest:
        found = swiglu_mlp(x, *layers)
    assert widest.rows == 8
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
