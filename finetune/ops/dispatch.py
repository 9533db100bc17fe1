"""Compile the elementwise kernels, or run them as plain torch.

A kernel is a plain torch function, which is its own reference. `@fused` compiles it to one pass over memory with
torch.compile if `configure_compile` chose so. A compiler failure costs speed, never the run.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import ParamSpec, TypeVar

import torch

from finetune.ops.limits import COMPILE_FROM_FLOPS

P = ParamSpec("P")
R = TypeVar("R")

# Whether this process compiles its kernels.
STATE = SimpleNamespace(compiled=False)
_log = logging.getLogger(__name__)


def configure_compile(device: torch.device, flops: float, wanted: bool | None = None) -> str:
    """Choose compiled or plain kernels for this process, once and before the first step.

    flops: floating-point operations of the whole run. wanted: `train.compile`; None decides by `flops`.
    Returns: a log line with the choice and the reason.
    """
    reason = None
    if wanted is False:
        reason = "train.compile=false"
    elif wanted is None and flops < COMPILE_FROM_FLOPS:
        reason = "the run is too short to recover the compile time"
    elif device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        reason = "no C++ compiler on PATH"
    STATE.compiled = reason is None
    return "compile: on" if STATE.compiled else f"compile: off ({reason})"


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function at its first call if `configure_compile` chose so; `.plain` is the function itself.

    It must be pure tensor arithmetic without autograd.
    """
    compiled: Callable[P, R] | None = None
    failed = False

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled, failed
        if not STATE.compiled or failed:
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function, dynamic=True, fullgraph=True)
        try:
            return compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of the compiler; an error of the kernel itself is raised again below
            failed = True
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            _log.warning("%s could not be compiled and runs as plain torch: %s", function.__name__, first_line)
            return function(*args, **kwargs)

    call.plain = function  # type: ignore[attr-defined]
    return call
