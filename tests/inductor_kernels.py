"""Let Inductor emit Triton code of our compiled kernels for an H200 without one, and print what it holds as JSON.

    python -m tests.inductor_kernels

Kernels are traced on the CPU and lowered as if their tensors were on a GPU. Triton compiles nothing, so this is fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import detect_fake_mode
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget

from finetune.ops import cross_entropy, divergence, elementwise
from finetune.ops.dispatch import arguments_by_row, mark_rows

GPU = torch.device("cuda", 0)
_PROPERTIES = SimpleNamespace(
    type="cuda",
    index=0,
    name="H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=60 << 20,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    total_memory=141 * 10**9,
)
# Widths of Qwen2.5-7B, of logits the rows of a chunk.
D, INNER, HEADS, HEAD, VOCABULARY, TOKENS, ROWS = 3584, 18_944, 28, 128, 152_064, 512, 441


class Lowered(Exception):
    """The code is there; nothing shall run."""


def seem_to_have_a_gpu() -> None:
    """Let torch.cuda, Inductor and Triton answer as on a machine with one GPU."""
    torch.accelerator.current_device_index = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_get_device_properties": lambda *_: _PROPERTIES,  # its callers keep `get_device_properties`
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name, value in {
        "is_available": True,
        "get_compute_capability": 90,
        "current_device": 0,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, value=value: value))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: _PROPERTIES)
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: GPU,
    )
    triton.runtime.driver.set_active(target)


def lowered(kernel: Any, args: list[Any]) -> str:
    """Return the code that Inductor emits for a kernel of ops/ and these arguments on a GPU."""
    codes: list[str] = []

    def lower(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        for node in graph.graph.nodes:
            values = node.meta.get("val")
            for value in values if isinstance(values, tuple | list) else [values]:
                if isinstance(value, FakeTensor):
                    value.fake_device = GPU
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": GPU}
        for value in inputs:
            if isinstance(value, FakeTensor):
                value.fake_device = GPU
        mode = detect_fake_mode(inputs)
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env)
        with V.set_graph_handler(lowering), V.set_fake_mode(mode), DebugContext():
            lowering.run(*inputs)
            codes.append(lowering.codegen()[0].value)
        raise Lowered

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        table = select_decomp_table()
        return aot_module_simplified(
            graph, inputs, fw_compiler=lower, decompositions=table, keep_inference_input_mutations=True
        )

    torch._dynamo.reset()
    mark_rows(arguments_by_row(kernel.plain), args)
    try:
        torch.compile(kernel.plain, dynamic=False, fullgraph=True, backend=backend)(*args)
    except Exception:
        if not codes:
            raise
    return codes[0]


def cases() -> Iterator[tuple[str, Any, list[Any]]]:
    """Yield a name, a kernel and its arguments, as training calls it."""

    def wide(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    angles = [wide(TOKENS, HEAD), wide(TOKENS, HEAD)]
    yield "rms_norm_forward", elementwise.rms_norm_forward, [wide(TOKENS, D), wide(D), 1e-6]
    yield "rms_norm_backward", elementwise.rms_norm_backward, [wide(TOKENS, D), wide(TOKENS, D), wide(D), 1e-6]
    yield "swiglu_forward", elementwise.swiglu_forward, [wide(TOKENS, INNER) for _ in range(2)]
    yield "swiglu_backward_", elementwise.swiglu_backward_, [wide(TOKENS, INNER) for _ in range(3)]
    yield "apply_rope_forward", elementwise.apply_rope_forward, [wide(TOKENS, HEADS, HEAD), *angles]
    yield "apply_rope_backward", elementwise.apply_rope_backward, [wide(TOKENS, HEADS, HEAD), *angles]
    logits, teacher = torch.zeros(ROWS, VOCABULARY), torch.zeros(ROWS, VOCABULARY)
    labels, weights = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS)
    gradient = wide(ROWS, VOCABULARY)
    yield "cross_entropy", cross_entropy._cross_entropy_rows_, [logits, labels, weights, gradient]
    yield "softmax", cross_entropy._softmax_rows_, [logits, weights]
    for name, kernel in divergence.DIVERGENCES.items():
        yield name, kernel, [logits, teacher, weights, 0.3, 1.0]


def findings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield for each case: its kernels, new tensors with more than rows, and sizes that a kernel gets at run time."""
    for name, kernel, args in cases():
        code = lowered(kernel, args)
        shapes = re.findall(r"empty_strided_cuda\(\(([^)]*)\)", code)
        yield (
            name,
            {
                "kernels": len(re.findall(r"async_compile\.triton\(", code)),
                "full": sum(any(size.strip() not in ("", "1") for size in shape.split(",")[1:]) for shape in shapes),
                "sizes": sorted(set(re.findall(r"\bks\d+\b", code))),
            },
        )


if __name__ == "__main__":
    seem_to_have_a_gpu()
    print(json.dumps(dict(findings())))
