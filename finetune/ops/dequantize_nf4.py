"""Dequantize NF4 weights in one Triton kernel, with the bits of bitsandbytes. Import it only where Triton is installed.

bitsandbytes launches three kernels where the scales are quantized too: for the 8-bit scales, their mean, and the
values. Values below 2**-126, which its build rounds to zero, are kept here.
Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of a program of 4 warps: a thread reads 4 bytes and writes 8 values, without shared memory.
_TILE = 1024


@triton.jit
def kernel(
    packed,  # uint8: a byte holds the codes of two values, the first one in its upper half
    absmax,  # a scale for each block of values: fp32, or uint8 with the next three
    scale_code,  # fp32 [256]
    scale_absmax,  # fp32, one for each SCALE_BLOCK scales
    scale_mean,  # fp32 scalar
    code,  # fp32 [16]
    out,
    size,
    BLOCK: tl.constexpr,  # values of a block, a power of two
    SCALE_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a program
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS * BLOCK  # 64 bits: the offset of a value may exceed 2**31
    left = tl.minimum(size - first, BLOCKS * BLOCK).to(tl.int32)
    block = tl.arange(0, BLOCKS)
    number = tl.program_id(0) * BLOCKS + block
    in_use = block * BLOCK < left
    scale = tl.load(absmax + number, in_use, 0)
    if scale_code is not None:
        # Rounded twice: a fused multiply-add, which `dequantize_nf4` turns off, has other bits.
        scale = tl.load(scale_code + scale) * tl.load(scale_absmax + number // SCALE_BLOCK, in_use, 0)
        scale += tl.load(scale_mean)
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    # A bound that the compiler sees as a multiple of 8 makes one load of several bytes.
    codes = tl.load(packed + first // 2 + byte, byte < left - left // 2, 0)
    values = tl.interleave(tl.load(code + (codes >> 4)), tl.load(code + (codes & 15))) * scale[:, None]
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + first + place, values.to(out.dtype.element_ty), place < left)


def options(blocksize: int, scale_blocksize: int = 1) -> dict[str, int]:
    """Return the constants of the kernel for blocks of these sizes."""
    return {"BLOCK": blocksize, "SCALE_BLOCK": scale_blocksize, "BLOCKS": max(1, _TILE // blocksize)}


def dequantize_nf4(packed: Tensor, state: Any, out: Tensor) -> None:
    """Write the weight of packed uint8 codes and their QuantState into `out`, contiguous, in its dtype."""
    second, size = state.state2 if state.nested else None, out.numel()
    scales = (second.code, second.absmax, state.offset) if second else (None, None, None)
    constants = options(state.blocksize, second.blocksize if second else 1)
    grid = (triton.cdiv(size, constants["BLOCK"] * constants["BLOCKS"]),)
    with torch.accelerator.device_index(out.device.index):  # where Triton launches
        kernel[grid](packed, state.absmax, *scales, state.code, out, size, **constants, enable_fp_fusion=False)
