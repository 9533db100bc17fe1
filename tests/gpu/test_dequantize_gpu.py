"""The Triton kernel on a GPU: the bits of bitsandbytes, in one launch."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from finetune.ops import dequantize as module
from finetune.ops.dequantize import dequantize, nf4_kernel

pytestmark = pytest.mark.gpu


def quantized(shape: tuple[int, int], dtype: torch.dtype, **options):
    generator = torch.Generator("cuda").manual_seed(shape[0])
    return quantize_4bit(3 * torch.randn(shape, device="cuda", generator=generator).to(dtype), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("shape", [(128, 896), (3584, 3584), (18944, 3584), (33, 1001), (5, 13), (1, 1)])
def test_values_are_bit_identical_to_bitsandbytes(shape, blocksize, nested, dtype):
    packed, state = quantized(shape, dtype, quant_type="nf4", compress_statistics=nested, blocksize=blocksize)
    assert nf4_kernel(packed.device, dtype, blocksize, nested) is not None
    found = dequantize(packed, state)
    assert found.dtype == dtype and found.shape == shape and torch.equal(found, dequantize_4bit(packed, state))


def test_a_weight_of_more_than_two_billion_values_is_complete(monkeypatch):
    """Repeats one block of rows: bitsandbytes counts values in 32 bits."""
    rows, width, times = 2**14, 2**13, 17
    packed, state = quantized((rows, width), torch.bfloat16, quant_type="nf4", blocksize=64, compress_statistics=False)
    expected = dequantize_4bit(packed, state)
    state.absmax, state.shape = state.absmax.repeat(times), torch.Size((times * rows, width))
    assert state.shape.numel() > 2**31
    try:
        for part in dequantize(packed.repeat(times, 1), state).split(rows):
            assert torch.equal(part, expected)
    finally:
        module._buffers.clear()


def test_fp4_is_dequantized_by_bitsandbytes():
    packed, state = quantized((64, 896), torch.bfloat16, quant_type="fp4", compress_statistics=True)
    assert torch.equal(dequantize(packed, state), dequantize_4bit(packed, state))
