"""Matrix products of 16-bit operands, in fp32 on CPUs without 16-bit instructions.

Without them (x86 up to AVX2), torch multiplies bf16 and fp16 at 1/6 of the speed of fp32, and at 1/100 if the right
operand is not transposed, as in every backward pass. A product of two 16-bit values is exact in fp32 and sums are fp32
in any case, so converted operands and a result rounded once give the same values. The right operand, usually a weight,
is converted in blocks that stay in cache.

Shapes: left [M, K], right [K, N].
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.system.accelerator import kind_of

# Values of the right operand converted at once: 4 MB. 1 MB and 16 MB are slower (measured on Zen 3).
_BLOCK = 2**20
# Rows or columns of a block are a multiple of this: results that end inside a cache line take 20 % longer.
_MULTIPLE = 64
# With at most so many rows on the left, torch's product with a transposed right operand is fastest in 16 bit.
_NATIVE_ROWS = 2
# With at most so many, the weight goes on the left: 2 times faster for a few rows, 20 % for 200 (measured on Zen 3).
_FEW_ROWS = 255
_memory = threading.local()


def uses_fp32_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether matrix products of this dtype are computed in fp32 on this device."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _has_native_matmul(dtype)


def require_fp32_sums() -> None:
    """Let a GPU add the parts of a 16-bit product in fp32.

    By default cuBLAS may split a long sum with few results, as for the gradient of a LoRA factor, and add its parts in
    16 bit.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def describe(device: torch.device, dtype: torch.dtype, all_here: bool) -> str | None:
    """Return a log line about matrix products; None if the device computes them natively.

    all_here: whether this module computes all products of a step, or torch computes some.
    """
    if not uses_fp32_matmul(device, dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    if all_here:
        return f"matmul: dtype=float32 (this CPU has no {name} instructions)"
    return (
        f"matmul: this CPU has no {name} instructions; fused kernels use float32, all others (train.kernels=peft, "
        "DoRA, int8) are up to 100 times slower\nhelp: set model.dtype=float32 and quant.compute_dtype=float32"
    )


@functools.cache
def _has_native_matmul(dtype: torch.dtype) -> bool:
    # The check that torch makes before it calls oneDNN. Without oneDNN, or a build without it, torch's slow loops run.
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and bool(supported())


def matmul(
    left_MK: Tensor,
    right_KN: Tensor,
    bias_N: Tensor | None = None,
    out_MN: Tensor | None = None,
    *,
    alpha: float = 1.0,
) -> Tensor:
    """Return alpha * left @ right + bias, summed in fp32 and rounded to the operands' dtype.

    out_MN: the result, if given; it may be columns of a wider matrix.
    """
    few = len(left_MK) <= _NATIVE_ROWS and right_KN.stride(0) == 1
    if few or not uses_fp32_matmul(left_MK.device, left_MK.dtype):
        if bias_N is not None:
            return torch.addmm(bias_N, left_MK, right_KN, alpha=alpha, out=out_MN)
        if alpha == 1:
            return torch.mm(left_MK, right_KN, out=out_MN)
        out_MN = left_MK.new_empty(len(left_MK), right_KN.shape[1]) if out_MN is None else out_MN
        return out_MN.addmm_(left_MK, right_KN, beta=0, alpha=alpha)
    out_MN = left_MK.new_empty(len(left_MK), right_KN.shape[1]) if out_MN is None else out_MN
    for columns, part in _wide_parts(left_MK, right_KN):
        part = part if alpha == 1 else part.mul_(alpha)
        out_MN[:, columns] = part if bias_N is None else part.add_(bias_N[columns])
    return out_MN


def has_fp32_result(operand: Tensor) -> bool:
    """Return whether the device has a product of such 16-bit operands with a result in fp32."""
    return operand.dtype in (torch.bfloat16, torch.float16) and kind_of(operand.device.type).fp32_results


def matmul_fp32(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """Return left @ right in fp32 where the device has such a product, else in the operands' dtype."""
    if has_fp32_result(left_MK):
        return torch.mm(left_MK, right_KN, out_dtype=torch.float32)
    return matmul(left_MK, right_KN)


def add_matmul_(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor, alpha: float = 1.0) -> Tensor:
    """sum += alpha * left @ right, in place."""
    if not uses_fp32_matmul(left_MK.device, left_MK.dtype):
        return sum_MN.addmm_(left_MK, right_KN, alpha=alpha)
    for columns, part in _wide_parts(left_MK, right_KN):
        sum_MN[:, columns].add_(part, alpha=alpha)
    return sum_MN


def _wide_parts(left_MK: Tensor, right_KN: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the product in fp32 by slices of columns; blocks of `right` follow its memory layout."""
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
    """Return a block in fp32, in one buffer per thread: new buffers would leave holes in the heap."""
    buffer = getattr(_memory, "block", None)
    if buffer is None or len(buffer) < block.numel():
        with torch.inference_mode(False):  # a buffer made inside inference mode is not writable outside
            buffer = _memory.block = torch.empty(block.numel(), dtype=torch.float32, device="cpu")
    return buffer[: block.numel()].view(block.shape).copy_(block)


def _step(width: int) -> int:
    """Return how many rows (or columns) of `width` values form a block."""
    return max(1, _BLOCK // max(1, width) // _MULTIPLE) * _MULTIPLE
