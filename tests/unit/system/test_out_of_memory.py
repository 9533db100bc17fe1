"""Work that runs out of memory is done in halves; other errors stay what they are."""

from __future__ import annotations

import errno
import gc
import weakref

import numpy as np
import pytest
import torch

from finetune.system.errors import OutOfMemory, ResourceError
from finetune.system.out_of_memory import in_halves, is_out_of_memory, result_or_none

YES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a primitive"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OutOfMemory("train.gradient_checkpointing=offload: needs 9 GB of pinned main memory, 1 GB is free"),
]
NO = [
    RuntimeError("shapes do not match"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory"),
]


def test_errors_of_memory_are_recognized():
    assert [is_out_of_memory(error) for error in (*YES, *NO)] == [True] * len(YES) + [False] * len(NO)


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), lambda: np.empty(2**58), lambda: bytearray(2**60)])
def test_real_errors_of_allocators_are_recognized(allocate):
    problems: list[str] = []
    assert result_or_none(lambda: (allocate(), 1), problems.append) is None and len(problems) == 1


def test_objects_of_failed_work_are_freed():
    gc.disable()  # reference counts alone must not be trusted, nor a lucky collection
    try:
        held = weakref.WeakSet()

        def work() -> int:
            tensor = torch.ones(3)
            held.add(tensor)
            cycle = [tensor]
            cycle.append(cycle)  # type: ignore[bad-argument-type]
            raise MemoryError

        assert result_or_none(work, print) is None and not held
    finally:
        gc.enable()


@pytest.mark.parametrize("room", [1, 2, 3, 8])
def test_each_item_is_worked_on_once_and_in_order(room, capsys):
    def work(items):
        if len(items) > room:
            raise MemoryError
        return [10 * item for item in items]

    found = list(in_halves(range(8), work, "lower something"))
    assert [item for items, _ in found for item in items] == list(range(8))
    assert [value for _, values in found for value in values] == [10 * item for item in range(8)]
    assert ("split" in capsys.readouterr().err) == (room < 8)


@pytest.mark.parametrize(("splits", "calls"), [(True, 3), (False, 1)])
def test_one_item_too_many_is_an_error_that_says_what_to_lower(splits, calls):
    sizes = []

    def work(items):
        sizes.append(len(items))
        raise MemoryError

    with pytest.raises(ResourceError, match=r"lower generation\.batch_size") as raised:
        list(in_halves(range(4), work, "lower generation.batch_size", splits=splits))
    assert raised.value.exit_code == 4 and len(sizes) == calls
