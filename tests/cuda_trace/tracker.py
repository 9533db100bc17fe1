"""Follow what reaches torch's dispatcher on a fake GPU: bytes of live storages, kernels, host synchronizations."""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# These launch nothing.
_VIEWS = set(
    "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze split detach alias as_strided unbind "
    "empty empty_like new_empty empty_strided split_with_sizes _reshape_alias is_same_size sym_size lift_fresh "
    "unflatten device layout new_empty_strided narrow reshape view_as".split()
)
# Kernels that one operation launches on CUDA where it is not one (read in ATen and bitsandbytes).
_LAUNCHES = {
    "index_put_": 8,
    "_index_put_impl_": 8,
    "nonzero": 4,
    "constant_pad_nd": 2,
    "_varlen_attn": 2,
    "_varlen_attn_backward": 6,
    "_foreach_norm": 4,
    "_fused_adamw_": 4,
}
# CUDA's allocator hands out multiples of this.
_ALLOCATION = 512


def _indices(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=like.device)


# Operations whose result's shape depends on data -> an answer. The CPU waits for some.
_WAITS = {"nonzero", "_unique2", "int8_vectorwise_quant"}
_ANSWERS: dict[str, Callable[..., Any]] = {
    "nonzero": lambda x: _indices(x, len(x), x.dim()),
    "_unique2": lambda x, *_: (torch.empty_like(x), _indices(x, 0), _indices(x, 0)),
    # The product, and the columns of its input with an outlier: eight of them.
    "int8_mixed_scaled_mm": lambda x, codes, weight, *_: (
        x.new_empty(*x.shape[:-1], len(weight)),
        x.new_empty(*x.shape[:-1], 8),
    ),
    # Codes and scales of rows, and the columns with an outlier.
    "int8_vectorwise_quant": lambda x, *_: (
        torch.empty_like(x, dtype=torch.int8),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
        _indices(x, 8),
    ),
}


class Tracker(TorchDispatchMode):
    """Counts by phase, which the caller names."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "setup"
        self.live: dict[int, tuple[int, str]] = {}
        self.now = self.peak = self.host_now = self.host_peak = 0
        self.at_peak: dict[int, tuple[int, str]] = {}
        self.workspace_at_peak = 0
        self.ops: dict[str, Counter[str]] = defaultdict(Counter)
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.widest = 0
        self._hidden = 0

    def start_measuring(self) -> None:
        """Forget counts and peak, not what is alive."""
        for counter in (self.ops, self.launches, self.syncs):
            counter.clear()
        self.peak, self.at_peak, self.workspace_at_peak, self.host_peak = self.now, dict(self.live), 0, self.host_now
        self.widest = 0

    def largest(self, count: int = 10) -> list[tuple[str, int]]:
        """Return the largest tensors at the peak, by the line that made them."""
        sizes: Counter[str] = Counter()
        for size, label in self.at_peak.values():
            sizes[label] += size
        return sizes.most_common(count)

    def note(self, tensor: torch.Tensor, label: str) -> None:
        """Follow a tensor's storage."""
        storage = tensor.untyped_storage()
        key, size, kind = storage._cdata, storage.nbytes(), tensor.device.type
        if key in self.live or (kind != "cuda" and not isinstance(tensor, FakeTensor)):
            return
        if kind == "cuda":
            size = -(-size // _ALLOCATION) * _ALLOCATION
            self.now += size
            self.widest = max(self.widest, tensor.numel())
        else:
            self.host_now += size
            self.host_peak = max(self.host_peak, self.host_now)
        self.live[key] = (size if kind == "cuda" else 0, label)
        weakref.finalize(storage, self._forget, key, size, kind)
        self._mark()

    def _forget(self, key: int, size: int, kind: str) -> None:
        self.live.pop(key, None)
        if kind == "cuda":
            self.now -= size
        else:
            self.host_now -= size

    def _mark(self, workspace: int = 0) -> None:
        if self.now + workspace > self.peak:
            self.peak, self.workspace_at_peak, self.at_peak = self.now + workspace, workspace, dict(self.live)

    @contextmanager
    def compiled(self, name: str, launches: int) -> Iterator[None]:
        """Count what is done inside as a few kernels that leave nothing but their results."""
        self._hidden += 1
        try:
            yield
        finally:
            self._hidden -= 1
            if not self._hidden:
                self.ops[self.phase][f"compiled {name}"] += 1
                self.launches[self.phase] += launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        kinds = {x.device.type for x in tensors} | {x.type for x in leaves if isinstance(x, torch.device)}
        pinned = kwargs.pop("pin_memory", None)
        if pinned is not None:
            kwargs["pin_memory"] = False  # a fake tensor cannot be pinned
        if "cuda" not in kinds and not pinned and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name, place = func.overloadpacket.__name__, _place()
        if name in _ANSWERS and (name != "int8_vectorwise_quant" or any(args[1:])):
            if name in _WAITS:
                self.syncs[f"{self.phase}: {name} {place}"] += 1
            self._count(name, place)
            found = _ANSWERS[name](*args)
            for x in found if isinstance(found, tuple) else (found,):
                self.note(x, place)
            return found
        if name in ("_local_scalar_dense", "item", "equal", "is_nonzero"):
            self.syncs[f"{self.phase}: {name} {place}"] += 1
            return True if name in ("equal", "is_nonzero") else 1.0 if tensors[0].dtype.is_floating_point else 1
        if name in ("_to_copy", "copy_") and kinds == {"cuda", "cpu"} and not _non_blocking(name, args, kwargs):
            self.syncs[f"{self.phase}: pageable copy {place}"] += 1
        out = func(*args, **kwargs)
        if not self._hidden:
            if "cuda" in kinds:
                self._count(name, place)
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.note(x, f"{place} {name} {tuple(x.shape)} {str(x.dtype)[6:]}")
        if name == "_varlen_attn_backward":
            self._mark(_flash_workspace(tensors))
        return out

    def _count(self, name: str, place: str) -> None:
        if name not in _VIEWS and not self._hidden:
            self.ops[self.phase][f"{name} {place}"] += 1
            self.launches[self.phase] += _LAUNCHES.get(name, 1)


def _non_blocking(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))


def _flash_workspace(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of flash attention's fp32 sums of dq, its row sums, and dk and dv of all query heads."""
    query, key, borders = tensors[1], tensors[2], tensors[6]
    rows, heads, width = query.shape
    rounded = rows + 128 * (len(borders) - 1)
    expanded = 2 * rows * heads * width * 2 if key.shape[1] != heads else 0
    return rounded * heads * width * 4 + heads * rounded * 4 + expanded


def _place() -> str:
    """Return the two innermost lines of the package, as `file:line<file:line`."""
    frame: Any = sys._getframe(2)
    found: list[str] = []
    while frame is not None and len(found) < 2:
        _, separator, file = frame.f_code.co_filename.rpartition("/finetune/")
        if separator:
            found.append(f"{file}:{frame.f_lineno}")
        frame = frame.f_back
    return "<".join(found) or "torch"
