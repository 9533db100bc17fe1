"""Run or compile the Triton kernels without a GPU, and print the findings as JSON.

    python -m tests.triton_kernels values     with TRITON_INTERPRET=1: on CPU tensors, compared with bitsandbytes
    python -m tests.triton_kernels targets    the launches of a CUDA process, compiled for five generations of GPUs

Triton's interpreter truncates where a GPU rounds fp32 to bf16.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from triton.backends.compiler import GPUTarget

from finetune.ops.dequantize_nf4 import dequantize_nf4, kernel

CAPABILITIES = (75, 80, 89, 90, 120)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows of projections in Qwen2.5 0.5B and 7B, and sizes that end inside a block and a byte.
SHAPES = ((8, 896), (2, 4864), (1, 18944), (3, 1001), (5, 13), (1, 1))


def values() -> Iterator[tuple[str, Any]]:
    """Yield each case and the largest distance from bitsandbytes, in steps between neighboring values of the dtype."""
    for shape in SHAPES:
        for blocksize in (64, 128, 4096):
            for nested in (False, True):
                for dtype in DTYPES:
                    packed, state = _quantized(shape, dtype, blocksize, nested)
                    out = torch.full(shape, torch.nan, dtype=dtype)
                    dequantize_nf4(packed, state, out)
                    bits = torch.int32 if dtype == torch.float32 else torch.int16
                    found, expected = (x.view(bits).long() for x in (out, dequantize_4bit(packed, state)))
                    yield f"{shape} {blocksize} {nested} {str(dtype)[6:]}", (found - expected).abs().max().item()


def targets() -> Iterator[tuple[str, Any]]:
    """Yield each case, its launches, and the instructions of each kernel that they needed."""
    for capability in CAPABILITIES:
        for dtype in DTYPES:
            for nested in (False, True):
                driver = _Driver(capability)
                triton.runtime.driver.set_active(driver)
                packed, state = _quantized((64, 896), dtype, 64, nested)
                for _ in range(2):
                    dequantize_nf4(packed, state, torch.empty(64, 896, dtype=dtype))
                compiled = kernel.device_caches[driver.get_current_device()][0].values()
                assert all(each.asm["cubin"] for each in compiled)
                words = [sorted({w for w in each.asm["ptx"].split() if "." in w}) for each in compiled]
                yield f"{capability} {str(dtype)[6:]} {nested}", {"launches": driver.launches, "instructions": words}


class _Driver:
    """A driver for one GPU that loads and launches nothing. Each has a device number of its own."""

    def __init__(self, capability: int):
        self.launches = 0
        self.get_current_device = lambda: id(self)
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.launcher_cls = lambda source, metadata: self._launch
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 48 * 1024},
        )

    def _launch(self, *arguments: Any) -> None:
        self.launches += 1


def _quantized(shape: tuple[int, int], dtype: torch.dtype, blocksize: int, nested: bool) -> tuple[torch.Tensor, Any]:
    weight = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)
    return quantize_4bit(weight, quant_type="nf4", blocksize=blocksize, compress_statistics=nested)


if __name__ == "__main__":
    print(json.dumps(dict({"values": values, "targets": targets}[sys.argv[1]]())))
