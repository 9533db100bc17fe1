"""Compile the elementwise kernels, or run them as plain torch.

A kernel is a plain torch function, which is its own reference. `@fused` compiles it to one pass over memory with
torch.compile if `configure_compile` chose so. A compiler failure costs speed, never the run.
"""

from __future__ import annotations

import functools
import inspect
import logging
import shutil
import subprocess
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch

from finetune.ops import determinism
from finetune.ops.limits import COMPILE_FROM_FLOPS, PLAIN_BLOCK_VALUES
from finetune.system.accelerator import on_gpu

P = ParamSpec("P")
R = TypeVar("R")

# compiled: whether this process compiles its kernels. failed: names of kernels that could not be compiled.
STATE = SimpleNamespace(compiled=False, failed=set())
# What torch.compile, Triton and the C compiler raise.
_COMPILER_ERRORS = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)
_log = logging.getLogger(__name__)


def configure_compile(device: torch.device, flops: float, wanted: bool | None = None) -> str:
    """Choose compiled or plain kernels for this process, once and before the first step.

    flops: floating-point operations of the whole run. wanted: `train.compile`; None decides by `flops`.
    Returns: a log line with the choice and the reason.
    """
    if wanted is False:
        reason = "train.compile=false"
    elif wanted is None and flops < COMPILE_FROM_FLOPS:
        reason = "the run is too short to recover the compile time"
    else:
        reason = compile_problem(device)
    STATE.compiled = reason is None
    return "compile: on" if STATE.compiled else f"compile: off ({reason})"


@functools.cache
def compile_problem(device: torch.device) -> str | None:
    """Return why kernels cannot be compiled for this device; None if they can.

    On a GPU, compile and run a small kernel: it needs Triton, a C compiler and Python's headers.
    """
    if device.type == "cpu":
        found = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
        return None if found else "no C++ compiler on PATH"
    try:
        torch.compile(_double, dynamic=True, fullgraph=True)(torch.ones(2, device=device))
    except torch.OutOfMemoryError:
        raise
    except _COMPILER_ERRORS as error:
        return f"a test kernel failed: {_first_line(error)}"
    return None


def _double(x_N: torch.Tensor) -> torch.Tensor:
    return x_N + x_N


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function at its first call if `configure_compile` chose so; `.plain` is the function itself.

    It must be pure tensor arithmetic without autograd. On a GPU, plain torch runs on some rows at a time: a compiled
    kernel has no temporaries, and plain ones of whole tensors would need several times their memory. Rows are
    independent: arguments with the same first letter of their shape as the first one (x_TD, cos_TW) share them.
    """
    compiled: dict[bool, Callable[P, R]] = {}
    by_row = arguments_by_row(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not STATE.compiled or function.__name__ in STATE.failed:
            return _run_plain(function, by_row, *args, **kwargs)
        first: Any = args[0]
        fixed, on_device = determinism.STATE.on, on_gpu(first)
        if fixed not in compiled:
            # Without this option, the block of a sum is the fastest of several, as measured.
            options: dict[str, Any] | None = {"deterministic": True} if fixed else None
            # With known widths, a GPU's thread reads 16 bytes at once (benchmarks/NOTES.md).
            compiled[fixed] = torch.compile(function, dynamic=not on_device, fullgraph=True, options=options)
        if on_device:
            mark_rows(by_row, args)
        try:
            return compiled[fixed](*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except _COMPILER_ERRORS as error:  # of the compiler; an error of the kernel itself is raised again below
            STATE.failed.add(function.__name__)
            message = "%s could not be compiled and runs as plain torch: %s"
            _log.warning(message, function.__name__, _first_line(error))
            return _run_plain(function, by_row, *args, **kwargs)

    call.plain = function  # type: ignore[attr-defined]
    return call


def arguments_by_row(function: Callable[..., Any]) -> frozenset[int]:
    """Return the positions of the arguments whose first dimension is that of the first argument."""
    shapes = [name.rpartition("_")[2] for name in inspect.signature(function).parameters]
    same = [i for i, shape in enumerate(shapes) if shape[0].isupper() and shape[0] == shapes[0][0]]
    return frozenset(same)


def mark_rows(by_row: frozenset[int], args: Sequence[Any]) -> None:
    """Let torch.compile take any number of rows, where it takes each width of its arguments by itself."""
    for i in by_row:
        torch._dynamo.maybe_mark_dynamic(args[i], 0)


def _run_plain(function: Callable[..., Any], by_row: frozenset[int], *args: Any, **kwargs: Any) -> Any:
    """Run a kernel as plain torch: on a GPU in blocks of rows, elsewhere at once."""
    first = args[0]
    if not by_row or not on_gpu(first) or first.numel() <= PLAIN_BLOCK_VALUES:
        return function(*args, **kwargs)
    return run_in_blocks(function, by_row, max(1, PLAIN_BLOCK_VALUES * len(first) // first.numel()), *args, **kwargs)


def run_in_blocks(function: Callable[..., Any], by_row: frozenset[int], block: int, *args: Any, **kwargs: Any) -> Any:
    """Call a function on `block` rows at a time, and return its tensor, tensors or None as of one call.

    by_row: positions of the arguments that have rows.
    """
    rows, found, results = len(args[0]), None, ()
    for start in range(0, rows, block):
        some = slice(start, start + block)
        found = function(*(arg[some] if i in by_row else arg for i, arg in enumerate(args)), **kwargs)
        parts = (found,) if isinstance(found, torch.Tensor) else found or ()
        results = results or tuple(part.new_empty(rows, *part.shape[1:]) for part in parts)
        for result, part in zip(results, parts, strict=True):
            result[some] = part
    return results[0] if isinstance(found, torch.Tensor) else results or None
