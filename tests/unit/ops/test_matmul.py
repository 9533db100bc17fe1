"""fp32 matmul of 16-bit operands equals a 16-bit product with fp32 sums, for any block size."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from finetune.ops import matmul as module
from finetune.ops.matmul import add_matmul_, matmul, uses_fp32_matmul

CPU = torch.device("cpu")
# Half a unit in the last place of bf16's 8 bits and fp16's 11.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def _no_products(monkeypatch):
    """Simulate a CPU without 16-bit instructions, with blocks so small that every operand has several."""
    monkeypatch.setattr(module, "_has_native_matmul", lambda dtype: False)
    monkeypatch.setattr(module, "_BLOCK", 600)
    monkeypatch.setattr(module, "_MULTIPLE", 4)
    monkeypatch.setattr(module, "_FEW_ROWS", 4)


def operands(sizes: tuple[int, int, int], dtype: torch.dtype, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, inner, columns = sizes
    torch.manual_seed(rows + columns)
    right = torch.randn(columns, inner).to(dtype).T if transposed else torch.randn(inner, columns).to(dtype)
    return torch.randn(rows, inner).to(dtype), right


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    """terms: number of terms of a sum; their fp32 rounding may move a result to the neighboring value."""
    slack = exact.abs() * ROUNDING[found.dtype] * 1.01 + terms * 2.0**-22
    assert ((found.double() - exact).abs() <= slack).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (5, 30, 70), (3, 301, 2), (2, 7, 1009), (1, 4864, 70), (64, 130, 1), (0, 5, 3), (4, 0, 3)]
)
def test_a_matmul_equals_float64_rounded_once(sizes, transposed, dtype):
    left, right = operands(sizes, dtype, transposed)
    bias = torch.randn(sizes[2]).to(dtype)
    exact = left.double() @ right.double()
    assert_rounded_once(matmul(left, right), exact, sizes[1])
    assert_rounded_once(matmul(left, right, bias), exact + bias.double(), sizes[1])
    place = torch.full((sizes[0], sizes[2]), torch.nan, dtype=dtype)
    assert matmul(left, right, out_MN=place) is place
    assert_rounded_once(place, exact, sizes[1])
    total = bias.expand(sizes[0], -1).clone()
    assert add_matmul_(total, left, right, alpha=0.3) is total
    assert_rounded_once(total, bias.double() + 0.3 * exact, sizes[1])


def test_the_operands_of_a_gradient_may_be_transposed_views():
    left, right = operands((90, 40, 70), torch.bfloat16, False)
    exact = left.double().T @ (left.double() @ right.double()).bfloat16().double()
    assert_rounded_once(matmul(left.T, matmul(left, right)), exact, 90)


@pytest.fixture
def widened(monkeypatch):
    """Record how many values of an operand are converted at once."""
    sizes, block, whole = [], module._widened, torch.Tensor.float
    monkeypatch.setattr(module, "_widened", lambda x: sizes.append(x.numel()) or block(x))
    monkeypatch.setattr(torch.Tensor, "float", lambda x: sizes.append(x.numel()) or whole(x))
    return sizes


@pytest.mark.parametrize("transposed", [False, True])
def test_at_most_one_block_of_the_right_operand_is_converted_at_once(monkeypatch, widened, transposed):
    monkeypatch.setattr(module, "_BLOCK", 2**14)  # four rows of the wider operand, the fewest that make a block
    left, right = operands((3, 64, 4096), torch.bfloat16, transposed)
    matmul(left, right)
    assert max(widened) <= 2**14 and right.numel() < sum(widened) <= right.numel() + 2 * left.numel()


@pytest.mark.parametrize("transposed", [False, True])
def test_all_blocks_use_one_buffer_per_thread(transposed):
    operands_of = [operands((3, 128, 256), torch.bfloat16, transposed) for _ in range(2)]
    for left, right in operands_of:
        matmul(left, right)
    memory = module._memory.block
    memory.fill_(torch.nan)
    expected = [matmul(*pair) for pair in operands_of]
    assert module._memory.block is memory
    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            found = threads.map(lambda pair: matmul(*pair), operands_of)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_buffer_made_in_inference_mode_is_usable_in_training(monkeypatch):
    monkeypatch.setattr(module, "_memory", threading.local())
    left, right = operands((3, 64, 100), torch.bfloat16, False)
    with torch.inference_mode():
        expected = matmul(left, right)
    assert torch.equal(matmul(left, right), expected)


@pytest.mark.parametrize(("rows", "ways"), [(1, 0), (2, 0), (3, 1)])
def test_a_transposed_operand_is_not_converted_for_one_or_two_rows(widened, rows, ways):
    left, right = operands((rows, 64, 100), torch.bfloat16, True)
    matmul(left, right)
    assert sum(widened) == ways * (left.numel() + right.numel())


def test_only_16_bit_dtypes_on_a_cpu_use_fp32_matmul():
    assert uses_fp32_matmul(CPU, torch.bfloat16) and uses_fp32_matmul(CPU, torch.float16)
    assert not uses_fp32_matmul(CPU, torch.float32) and not uses_fp32_matmul(CPU, torch.float64)
    assert not uses_fp32_matmul(torch.device("cuda"), torch.bfloat16)


def test_the_check_for_native_matmul_is_that_of_torch(monkeypatch):
    monkeypatch.undo()
    module._has_native_matmul.cache_clear()
    for dtype, ask in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported),
    ):
        assert uses_fp32_matmul(CPU, dtype) is not ask()


def test_a_torch_without_onednn_uses_fp32_matmul(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    # Asked beside the cache, which keeps the answer of the torch that is there.
    assert not module._has_native_matmul.__wrapped__(torch.bfloat16)


def test_the_log_line_names_the_dtype_of_matrix_products(monkeypatch):
    fast = module.describe(CPU, torch.bfloat16, all_here=True)
    assert fast is not None and fast.startswith("matmul: dtype=float32") and "bfloat16" in fast
    slow = module.describe(CPU, torch.float16, all_here=False)
    assert slow is not None and "float16" in slow and "train.kernels=peft" in slow and "model.dtype=float32" in slow
    assert module.describe(CPU, torch.float32, all_here=False) is None
    monkeypatch.setattr(module, "_has_native_matmul", lambda dtype: True)
    assert module.describe(CPU, torch.bfloat16, all_here=True) is None


def test_a_gpu_adds_partial_sums_in_fp32():
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction
    try:
        settings.allow_bf16_reduced_precision_reduction = settings.allow_fp16_reduced_precision_reduction = True
        module.require_fp32_sums()
        assert not settings.allow_bf16_reduced_precision_reduction
        assert not settings.allow_fp16_reduced_precision_reduction
    finally:
        settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction = before
