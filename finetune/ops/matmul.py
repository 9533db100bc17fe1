"""Matrix products of 16-bit operands, by way of fp32 where the processor has none of its own.

Without 16-bit instructions (x86 up to AVX2) torch multiplies bf16 and fp16 at a sixth of fp32's speed, and at a
hundredth where the right operand is not a transposed one, as in every backward pass. A 16-bit product is exact in fp32
and is summed there anyway, so widened operands and a result rounded once say the same. The right operand, a weight as a
rule, is widened a block at a time, which stays in the processor's cache.

Shapes: left [M, K], right [K, N].
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Values of the right operand widened at once: 4 MB. Four times fewer and more are slower (measured on Zen 3).
_BLOCK = 2**20
# Rows or columns of a block are a multiple: results that end inside a cache line take a fifth longer.
_MULTIPLE = 64
# Up to so many rows on the left torch's own product with a transposed right operand reads 16 bit, and is the fastest.
_NATIVE_ROWS = 2
# Up to so many the weight goes on the left: twice as fast for a few, a fifth for two hundred (measured on Zen 3).
_FEW_ROWS = 255
_memory = threading.local()


def uses_fp32_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this type go by way of fp32 on this device."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _has_products(dtype)


def describe(device: torch.device, dtype: torch.dtype, all_here: bool) -> str | None:
    """What to tell about the products of a run; None where the device makes them as they are.

    all_here: whether all of a step's products are made here, or some are left to torch.
    """
    if not uses_fp32_matmul(device, dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    if all_here:
        return f"products: in float32, since this processor has none in {name}"
    return (
        f"products: this processor has none in {name}; the fast path makes its own in float32, the others "
        f"(train.kernels=peft, DoRA, int8) are left to torch and take up to a hundred times as long: set "
        "model.dtype=float32 and quant.compute_dtype=float32"
    )


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    # The question that torch itself asks before it hands a product to oneDNN; its own loops are the slow ones.
    # Where torch was built without oneDNN nobody can be asked, and its own loops are all there is.
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    ask = getattr(torch.ops.mkldnn, name, None)
    return ask is not None and bool(ask())


def matmul(left_MK: Tensor, right_KN: Tensor, bias_N: Tensor | None = None, out_MN: Tensor | None = None) -> Tensor:
    """left @ right + bias, summed in fp32 and rounded to the operands' type; in `out_MN`, where it is given."""
    few = len(left_MK) <= _NATIVE_ROWS and right_KN.stride(0) == 1
    if few or not uses_fp32_matmul(left_MK.device, left_MK.dtype):
        if bias_N is None:
            return torch.mm(left_MK, right_KN, out=out_MN)
        return torch.addmm(bias_N, left_MK, right_KN, out=out_MN)
    out_MN = left_MK.new_empty(len(left_MK), right_KN.shape[1]) if out_MN is None else out_MN
    for columns, part in _wide_parts(left_MK, right_KN):
        out_MN[:, columns] = part if bias_N is None else part.add_(bias_N[columns])
    return out_MN


def add_matmul_(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor, alpha: float = 1.0) -> Tensor:
    """sum += alpha * left @ right, in place."""
    if not uses_fp32_matmul(left_MK.device, left_MK.dtype):
        return sum_MN.addmm_(left_MK, right_KN, alpha=alpha)
    for columns, part in _wide_parts(left_MK, right_KN):
        sum_MN[:, columns].add_(part, alpha=alpha)
    return sum_MN


def _wide_parts(left_MK: Tensor, right_KN: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The product in fp32, some columns at a time: blocks of `right` follow its memory."""
    inner, columns = right_KN.shape
    if right_KN.stride(0) == 1:
        wide_MK = left_MK.float()
        step = _step(inner)
        for start in range(0, columns, step):
            block = slice(start, min(start + step, columns))
            part_NK = _widened(right_KN.T[block])
            yield block, wide_MK @ part_NK.T if len(left_MK) > _FEW_ROWS else (part_NK @ wide_MK.T).T
        return
    sum_MN = left_MK.new_zeros(len(left_MK), columns, dtype=torch.float32)
    step = _step(columns)
    for start in range(0, inner, step):
        block = slice(start, start + step)
        sum_MN.addmm_(left_MK[:, block].float(), _widened(right_KN[block]))
    yield slice(columns), sum_MN


def _widened(block: Tensor) -> Tensor:
    """A block in fp32, until this thread widens the next: one from the heap for each would leave holes there."""
    buffer = getattr(_memory, "block", None)
    if buffer is None or len(buffer) < block.numel():
        with torch.inference_mode(False):  # what is made within could not be written to outside
            buffer = _memory.block = torch.empty(block.numel(), dtype=torch.float32, device="cpu")
    return buffer[: block.numel()].view(block.shape).copy_(block)


def _step(width: int) -> int:
    """How many rows (or columns) of so many values make a block."""
    return max(1, _BLOCK // max(1, width) // _MULTIPLE) * _MULTIPLE
