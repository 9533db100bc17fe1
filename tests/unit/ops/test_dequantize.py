"""Dequantized 4-bit weights are bit-identical to bitsandbytes, whole and in slices."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from finetune.ops import dequantize as module
from finetune.ops import matmul
from finetune.ops.dequantize import dequantize, dequantized_values


def quantized(shape: tuple[int, int], dtype: torch.dtype, **options):
    torch.manual_seed(shape[0])
    return quantize_4bit(torch.randn(shape).to(dtype) * 3, **options)


@pytest.mark.parametrize("has_products", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "blocksize"), [((3, 5), 64), ((40, 72), 64), ((64, 896), 128), ((33, 1000), 4096)])
def test_values_are_bit_identical_to_bitsandbytes(monkeypatch, shape, blocksize, nested, dtype, has_products):
    monkeypatch.setattr(matmul, "_has_native_matmul", lambda dtype: has_products)
    monkeypatch.setattr(module, "_BLOCK", 2**13)
    packed, state = quantized(shape, dtype, quant_type="nf4", compress_statistics=nested, blocksize=blocksize)
    found = dequantize(packed, state)
    assert found.dtype == dtype and torch.equal(found, dequantize_4bit(packed, state))


def test_a_weight_of_several_blocks_is_complete(monkeypatch):
    monkeypatch.setattr(matmul, "_has_native_matmul", lambda dtype: False)
    packed, state = quantized((1100, 2048), torch.bfloat16, quant_type="nf4", compress_statistics=True)
    assert state.shape.numel() > 2 * module._BLOCK
    assert torch.equal(dequantize(packed, state), dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [False, True])
def test_any_slice_from_the_start_of_a_block_can_be_dequantized(nested):
    packed, state = quantized((6, 200), torch.float32, quant_type="nf4", compress_statistics=nested, blocksize=64)
    values, whole = dequantized_values(packed, state, torch.float32), dequantize_4bit(packed, state).flatten()
    for first, last in ((0, 1200), (64, 65), (128, 1200), (1152, 1200)):
        assert torch.equal(values(first, last), whole[first:last])
    assert state.dtype == torch.float32 and state.shape == (6, 200) and state.nested == nested  # untouched


CPU = torch.device("cpu")


@pytest.fixture
def nf4_kernel(monkeypatch):
    """Return a function that probes a kernel, in place of the one of Triton."""

    def probe(kernel, *key):
        monkeypatch.setitem(sys.modules, "finetune.ops.dequantize_nf4", SimpleNamespace(dequantize_nf4=kernel))
        return module.nf4_kernel(CPU, *key)

    module.nf4_kernel.cache_clear()
    yield probe
    module.nf4_kernel.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_a_kernel_counts_if_it_has_the_bits_of_bitsandbytes(nf4_kernel, caplog, nested, dtype):
    def right(packed, state, out):
        out.copy_(dequantize_4bit(packed, state))

    def truncated(packed, state, out):
        exact = dequantize_4bit(packed, SimpleNamespace(**{**state.__dict__, "dtype": torch.float32}))
        out.copy_((exact.view(torch.int32) & -(2**16)).view(torch.float32))

    assert nf4_kernel(right, dtype, 64, nested) is right and not caplog.records
    assert nf4_kernel(truncated, dtype, 128, nested) is None and len(caplog.records) == 1


def test_a_kernel_that_fails_is_tried_once(nf4_kernel, caplog):
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        raise ValueError("no driver\nand more")

    for _ in range(3):
        assert nf4_kernel(failing, torch.bfloat16, 64, True) is None
    assert len(calls) == 1
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "ValueError: no driver" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_memory_that_runs_out_is_no_reason_against_the_kernel(nf4_kernel):
    def failing(*arguments):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        nf4_kernel(failing, torch.bfloat16, 64, True)
