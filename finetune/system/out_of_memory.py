"""Recognize that memory ran out, free what the failed work holds, and do the work again in smaller parts."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from finetune.system.console import log
from finetune.system.errors import OutOfMemory, ResourceError
from finetune.system.machine import malloc_trim

T = TypeVar("T")
R = TypeVar("R")
# CUDA, its allocator in torch, and Triton; torch's allocator of a CPU; the system; cuBLAS, cuDNN and cuSPARSE; C++.
_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, of a GPU or of the machine."""
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in _TEXTS)


def result_or_none(work: Callable[[], R]) -> R | None:
    """Return the result of `work`; None if memory ran out, once all that it held is free again.

    Any other error is raised. `work` must not return None.
    """
    try:
        return work()
    except Exception as error:
        # The traceback holds the frames of the failed work, and these their tensors, until this block ends.
        if not is_out_of_memory(error):
            raise
    release_memory()
    return None


def release_memory() -> None:
    """Free objects in cycles, and return the free memory of torch's allocator and of the heap to device and system."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    malloc_trim()


def in_halves(items: Sequence[T], work: Callable[[Sequence[T]], R], advice: str) -> Iterator[tuple[Sequence[T], R]]:
    """Yield items with the result of `work` on them: all at once, or in halves of halves if memory runs out.

    Args:
        work: must not return None.
        advice: what to change if a single item does not fit.

    Raises:
        ResourceError: a single item does not fit.
    """
    result = result_or_none(lambda: work(items))
    if result is not None:
        yield items, result
        return
    if len(items) == 1:
        raise ResourceError(f"out of memory with a batch of one row\nhelp: {advice}")
    half = len(items) // 2
    log(f"WARNING: memory: out of memory with a batch of {len(items)} rows, it is split\nhelp: {advice}")
    for part in (items[:half], items[half:]):
        yield from in_halves(part, work, advice)
