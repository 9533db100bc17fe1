"""The ideal time of a step: what single operations cost, and the least share of a GPU's rate that a 7B must reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.flops import step_flops
from finetune.models.families import QWEN25_SHAPES
from tests.cuda_trace.conftest import Results
from tests.cuda_trace.fake_gpu import GPU, _nf4_kernel, fake_gpu
from tests.cuda_trace.roofline import DEVICES, Cost, Device, Kernel
from tests.cuda_trace.stub import has_compiler
from tests.cuda_trace.tracker import Tracker

T, D, V = 64, 512, 1000
_SHAPE = QWEN25_SHAPES["7B"]
# Step -> tokens, and the least modeled share of an H200: raise it with the code.
_LEAST_SHARE = {
    "7B timed 8192": (8192, 0.75),
    "7B timed 8192 recompute all": (8192, 0.55),
    "7B timed 2048": (2048, 0.70),
    "7B timed 2048 recompute all": (2048, 0.53),
}


def _bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=GPU)


def _ids(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64, device=GPU)


def _attend() -> object:
    from torch.nn.attention.varlen import varlen_attn

    borders = torch.zeros(3, dtype=torch.int32, device=GPU)
    query, key = _bf16(T, 4, 128), _bf16(T, 2, 128)
    return varlen_attn(query, key, key, borders, borders, T // 2, T // 2, window_size=(-1, 0), enable_gqa=True)


def _add_in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.mul_(y.float().exp())
    return x.amax(-1)


_OPERATIONS: dict[str, tuple[Callable[[Tracker], object], Cost]] = {
    "a product": (lambda _: _bf16(T, D) @ _bf16(D, V), Cost(2 * T * D * V, 2 * (T * D + D * V), 2 * T * V)),
    "a product that is added": (
        lambda _: _bf16(T, V).addmm_(_bf16(T, D), _bf16(D, V)),
        Cost(2 * T * D * V, 2 * (T * D + D * V + T * V), 2 * T * V),
    ),
    "an fp32 product": (
        lambda _: torch.mm(_bf16(T, D), _bf16(D, V), out_dtype=torch.float32, out=torch.empty(T, V, device=GPU)),
        Cost(2 * T * D * V, 2 * (T * D + D * V), 4 * T * V),
    ),
    "a sum": (lambda _: _bf16(T, D) + _bf16(T, D), Cost(0, 4 * T * D, 2 * T * D)),
    "a sum in place": (lambda _: _bf16(T, D).add_(_bf16(T, D)), Cost(0, 4 * T * D, 2 * T * D)),
    "a sum with an expanded row": (
        lambda _: _bf16(T, D) + _bf16(1, D).expand(T, D),
        Cost(0, 2 * (T + 1) * D, 2 * T * D),
    ),
    "a cast": (lambda _: _bf16(T, D).float(), Cost(0, 2 * T * D, 4 * T * D)),
    "zeros": (lambda _: _bf16(T, D).zero_(), Cost(0, 0, 2 * T * D)),
    "rows of a table": (lambda _: _bf16(V, D).index_select(0, _ids(T)), Cost(0, 8 * T + 2 * T * D, 2 * T * D)),
    "writes into a table": (
        lambda _: _bf16(V, D).index_put_((_ids(T),), _bf16(T, D)),
        Cost(0, 8 * T + 2 * T * D, 2 * T * D),
    ),
    "causal attention": (
        lambda _: _attend(),
        # Two documents of T / 2 tokens; statistics in fp32 and the state of dropout beside the result.
        Cost(4 * 2 * (T // 2) ** 2 * 4 * 128 / 2, 2 * T * (4 + 2 + 2) * 128 + 2 * 12, 2 * T * 4 * 128 + 4 * 4 * T + 16),
    ),
    "a compiled function": (
        lambda tracker: tracker.run_compiled(_add_in_place, (_bf16(T, D), _bf16(T, D)), launches=1),
        Cost(0, 4 * T * D, 2 * T * D + 2 * T),
    ),
}


@pytest.mark.parametrize("operation", _OPERATIONS)
def test_operations_and_bytes(operation: str) -> None:
    work, expected = _OPERATIONS[operation]
    assert _traced(work)[-1].cost == expected


def test_a_dequantized_weight_reads_half_a_byte_per_value() -> None:
    def work(tracker: Tracker) -> None:
        packed, out = torch.empty(V * D // 2, 1, dtype=torch.uint8, device=GPU), _bf16(V, D)
        state = type("State", (), {"absmax": torch.empty(V * D // 64, dtype=torch.uint8, device=GPU)})
        _nf4_kernel()(packed, state, out)

    (kernel,) = _traced(work)
    assert kernel.kind == "dequantize"
    assert kernel.cost == Cost(0, V * D // 2 + V * D // 64, 2 * V * D)


def _traced(work: Callable[[Tracker], object]) -> list[Kernel]:
    tracker = Tracker()
    with fake_gpu(tracker):
        work(tracker)
    return list(tracker.kernels)


def test_a_kernel_takes_the_longest_of_work_bytes_and_launches() -> None:
    device = Device(1e12, 1e12, 2e12, 4e12, 1e9, launch_seconds=1e-6)

    def seconds(name: str, flops: float, moved: int, launches: int = 1) -> float:
        return Kernel("forward", name, "", launches, Cost(flops, moved, moved)).seconds(device)

    assert seconds("mm", 3e12, 1) == 3.0
    assert seconds("_varlen_attn", 3e12, 1) == 1.5
    assert seconds("_varlen_attn_backward", 3e12, 1) == 0.75
    assert seconds("mm", 1.0, 10**9) == 2.0
    assert seconds("add", 0.0, 1, launches=4) == 4e-6


@pytest.mark.skipif(not has_compiler(), reason="needs g++, which builds the stub of a CUDA device")
@pytest.mark.parametrize("name", _LEAST_SHARE)
def test_the_modeled_share_of_an_h200(results: Results, name: str) -> None:
    tokens, least = _LEAST_SHARE[name]
    two, three = (sum(results.of(f"{name}, layers={n}")["ideal_seconds"]["h200"].values()) for n in (2, 3))
    seconds = two + (_SHAPE["num_hidden_layers"] - 2) * (three - two)
    share = step_flops(_SHAPE, tokens, tokens / 2) / seconds / DEVICES["h200"].ceiling_flops
    print(f"{name}: {1e3 * seconds:.1f} ms, {tokens / seconds:,.0f} tokens/s, {share:.1%}")
    assert share >= least
