"""Recognize that memory ran out, free what the failed work holds, and do the work again in smaller parts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from finetune.system.accelerator import release_caches
from finetune.system.console import log
from finetune.system.errors import OutOfMemory, ResourceError
from finetune.system.machine import malloc_trim

T = TypeVar("T")
R = TypeVar("R")
# CUDA, its allocator in torch, and Triton; torch's allocator of a CPU; the system; cuBLAS, cuDNN and cuSPARSE; C++;
# oneDNN, which names no reason.
_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "could not create a primitive",
    "could not create a memory object",
)

_SHOWN = 200


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, of a GPU or of the machine."""
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in _TEXTS)


def result_or_none(work: Callable[[], R], report: Callable[[str], None]) -> R | None:
    """Return the result of `work`; None if memory ran out, once all that it held is free again.

    Any other error is raised.

    Args:
        work: must not return None.
        report: gets the first line of the error.
    """
    try:
        return work()
    except Exception as error:
        # The traceback holds the frames of the failed work, and these their tensors, until this block ends.
        if not is_out_of_memory(error):
            raise
        report((str(error) or type(error).__name__).splitlines()[0][:_SHOWN])
    release_memory()
    return None


def release_memory() -> None:
    """Free objects in cycles, and return the free memory of torch's allocator and of the heap to device and system."""
    gc.collect()
    release_caches()
    malloc_trim()


def in_halves(
    items: Sequence[T], work: Callable[[Sequence[T]], R], advice: str, *, splits: bool = True
) -> Iterator[tuple[Sequence[T], R]]:
    """Yield items with the result of `work` on them: all at once, or in halves of halves if memory runs out.

    Args:
        work: must not return None.
        advice: what to change if a single item does not fit.
        splits: False where other processes wait for this one inside `work`.

    Raises:
        ResourceError: a single item does not fit, or items that must not be split.
    """
    problems: list[str] = []
    result = result_or_none(lambda: work(items), problems.append)
    if result is not None:
        yield items, result
        return
    found = f"out of memory with {len(items)} rows in a batch ({problems[0]})"
    if len(items) == 1 or not splits:
        raise ResourceError(f"{found}\nhelp: {advice}")
    half = len(items) // 2
    log(f"WARNING: memory: {found}; the batch is split")
    for part in (items[:half], items[half:]):
        yield from in_halves(part, work, advice)
