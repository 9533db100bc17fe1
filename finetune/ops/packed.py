"""Weights in the layout of oneDNN, for products of few rows on a CPU with 16-bit instructions.

torch.mm brings a weight into this layout in every call. With up to 16 rows, that takes half of the time
(benchmarks/NOTES.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.ops.matmul import uses_fp32_matmul


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A frozen linear layer. packed: its weight, from `pack`."""

    packed: Tensor
    bias: Tensor | None

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x."""
        return torch.ops.mkldnn._linear_pointwise(x_TD, self.packed, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Return whether a weight has a layout of its own on its device: 16 bit on a CPU with such products."""
    half = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return half and known and not uses_fp32_matmul(weight.device, weight.dtype)


def pack(weight_OD: Tensor) -> Tensor:
    """Return a copy of a weight that `PackedLinear` reads; torch has no other operation on it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OD)
