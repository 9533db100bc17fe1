"""4-bit weights in the type that a product takes, bit for bit as bitsandbytes makes them."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from finetune.ops.matmul import uses_fp32_matmul

# Values made at once by way of fp32: 2 MB, which stay in the processor's cache. A multiple of every quantization block.
# With 4 MB, a twentieth faster, they left holes in the heap: 0.2 GB of 1.6 for 0.5B and 512 tokens.
_BLOCK = 2**19

_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """The weight [O, D] in its state's dtype. On a GPU it lies in a buffer that the next call overwrites.

    packed: uint8, two values a byte. state: bitsandbytes' QuantState.
    """
    from bitsandbytes.functional import dequantize_4bit

    size = state.shape.numel()
    if packed.device.type == "cuda":
        key = (packed.device, state.dtype)
        if key not in _buffers or _buffers[key].numel() < size:
            _buffers[key] = torch.empty(size, dtype=state.dtype, device=packed.device)
        return dequantize_4bit(packed, state, out=_buffers[key][:size].view(state.shape))
    if not uses_fp32_matmul(packed.device, state.dtype):
        return dequantize_4bit(packed, state)
    # Without 16-bit instructions bitsandbytes rounds one value at a time, which takes as long again as all else.
    weight, values = torch.empty(size, dtype=state.dtype), dequantized_values(packed, state, torch.float32)
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        weight[first:last] = values(first, last)
    return weight.view(state.shape)


def dequantized_values(packed: Tensor, state: Any, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    """(first, last) -> those of a weight's values, one row after the other, in `dtype` [last - first].

    `first` is the first value of a quantization block.
    """
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax

    def values(first: int, last: int) -> Tensor:
        part = copy(state)
        part.nested, part.dtype, part.shape = False, dtype, torch.Size((last - first,))
        part.absmax = absmax[first // state.blocksize : -(-last // state.blocksize)]
        return dequantize_4bit(packed.view(-1, 1)[first // 2 : -(-last // 2)], part).flatten()

    return values
