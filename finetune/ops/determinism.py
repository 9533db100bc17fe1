"""Fix the order of sums in which a GPU's kernels differ from run to run (`train.deterministic`).

`torch.use_deterministic_algorithms` would also stop or slow other operations. So it is on around single operations:

- the backward pass of attention: flash attention adds the gradients of queries by atomic operations, the
  memory-efficient kernel those of parts of the keys
- the measurements by which torch.compile chooses the blocks of a reduction (see `fused` in dispatch.py)

All other operations of this package add in a fixed order on one GPU; `tests/cuda_trace` checks their names.
A CPU needs none of this.

Source: ATen's attention_backward.cu and ScanUtils.cuh, read for torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor

from finetune.system.accelerator import on_gpu

# on: whether this process runs deterministic kernels.
STATE = SimpleNamespace(on=False)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Run what is inside as `train.deterministic` says. torch's own setting is afterwards what it was before."""
    before, setting = STATE.on, _setting()
    STATE.on = wanted
    try:
        yield
    finally:
        STATE.on = before
        if _setting() != setting:  # an error during the backward pass of attention
            _set(*setting)


def fix_backward(output: Tensor) -> Tensor:
    """Let the operation that made this tensor run its backward pass deterministically, and return the tensor."""
    node = output.grad_fn
    if STATE.on and on_gpu(output) and node is not None:
        setting = _setting()
        node.register_prehook(lambda _: _set(True, False))
        node.register_hook(lambda *_: _set(*setting))
    return output


def cumulative_sums(values: Tensor) -> Tensor:
    """Return the cumulative sums along the last dimension, added in a fixed order.

    On a GPU, torch adds a single row in parts, in no fixed order, and several rows one by one.
    """
    if on_gpu(values) and values.numel() == values.shape[-1]:
        return torch.stack([values, values]).cumsum(-1)[0]
    return values.cumsum(-1)


def _setting() -> tuple[bool, bool]:
    """Return torch's setting: on, only warn."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set(on: bool, warn_only: bool) -> None:
    torch.use_deterministic_algorithms(on, warn_only=warn_only)
