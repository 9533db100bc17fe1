"""Dequantize 4-bit weights, bit-identical to bitsandbytes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from finetune.ops.matmul import uses_fp32_matmul
from finetune.system.accelerator import kind_of

# Values dequantized at once in fp32: 2 MB, which stay in cache. A multiple of every quantization block. 4 MB are 5 %
# faster but leave holes in the heap: 0.2 GB of 1.6 for 0.5B and 512 tokens.
_BLOCK = 2**19

_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_log = logging.getLogger(__name__)


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """Return the weight [O, D] in the dtype of its state; maybe in a buffer that the next call overwrites.

    packed: uint8, two values per byte. state: QuantState of bitsandbytes.
    """
    from bitsandbytes.functional import dequantize_4bit

    size = state.shape.numel()
    if kind_of(packed.device.type).dequantizes_in_place:
        key = (packed.device, state.dtype)
        if key not in _buffers or _buffers[key].numel() < size:
            _buffers[key] = torch.empty(size, dtype=state.dtype, device=packed.device)
        weight = _buffers[key][:size].view(state.shape)
        if state.quant_type == "nf4" and packed.dtype == torch.uint8:
            kernel = nf4_kernel(packed.device, state.dtype, state.blocksize, state.nested)
            if kernel is not None:
                kernel(packed, state, weight)
                return weight
        return dequantize_4bit(packed, state, out=weight)
    if not uses_fp32_matmul(packed.device, state.dtype):
        return dequantize_4bit(packed, state)
    # Without 16-bit instructions, bitsandbytes rounds one value at a time, which doubles the time.
    weight, values = torch.empty(size, dtype=state.dtype), dequantized_values(packed, state, torch.float32)
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        weight[first:last] = values(first, last)
    return weight.view(state.shape)


@functools.cache
def nf4_kernel(
    device: torch.device, dtype: torch.dtype, blocksize: int, nested: bool
) -> Callable[[Tensor, Any, Tensor], None] | None:
    """Return the function (packed, state, out) of one kernel; None where it fails or has other bits than bitsandbytes.

    The first call for these arguments compiles the kernel and tries it on the device.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    ramp = torch.arange(2**15, dtype=torch.float32, device=device)  # scales of many sizes, without random numbers
    weight = (ramp.sin() * ramp).to(dtype).view(2**7, 2**8)
    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
    try:
        from finetune.ops.dequantize_nf4 import dequantize_nf4

        found = torch.empty_like(weight)
        dequantize_nf4(packed, state, found)
        if torch.equal(found, dequantize_4bit(packed, state)):
            return dequantize_nf4
        reason = "other bits on this device"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - of Triton, its compilers or the driver; bitsandbytes needs none of them
        reason = " ".join(f"{type(error).__name__}: {error}".split("\n", 1)[0].split())
    _log.warning("dequantize: kernels=bitsandbytes (Triton: %s)", reason)
    return None


def dequantized_values(packed: Tensor, state: Any, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    """Return a function (first, last) -> flat values [last - first] in `dtype`; `first` starts a quantization block."""
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax

    def values(first: int, last: int) -> Tensor:
        part = copy(state)
        part.nested, part.dtype, part.shape = False, dtype, torch.Size((last - first,))
        part.absmax = absmax[first // state.blocksize : -(-last // state.blocksize)]
        return dequantize_4bit(packed.view(-1, 1)[first // 2 : -(-last // 2)], part).flatten()

    return values
