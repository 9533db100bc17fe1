"""Follow what reaches torch's dispatcher on a fake GPU: bytes of live storages, kernels, host synchronizations."""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda_trace.roofline import Cost, Kernel, bytes_of, cost_of, gpu_tensors, read_and_written

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
        self.kernels: Counter[Kernel] = Counter()
        self.widest = 0
        # Names of operations on the GPU: with torch's own algorithms, and with its deterministic ones.
        self.names: set[str] = set()
        self.fixed: set[str] = set()
        self._hidden = 0
        self._touched: dict[str, set[int]] = {}

    def start_measuring(self) -> None:
        """Forget counts and peak, not what is alive."""
        for counter in (self.ops, self.launches, self.syncs, self.kernels):
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
        storage, key, kind = tensor.untyped_storage(), _key(tensor), tensor.device.type
        size = storage.nbytes()
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

    def run_compiled(self, function: Callable[..., Any], args: tuple[Any, ...], launches: int, passes: int = 1) -> Any:
        """Run a function as a few kernels that leave nothing but their results, and read a tensor `passes` times."""
        self._hidden += 1
        self._touched = {"read": set(), "written": set()}
        try:
            out = function(*args)
        finally:
            self._hidden -= 1
        place, name = _place(), f"compiled {function.__name__}"
        inputs, results = list(gpu_tensors(args)), list(gpu_tensors((out,)))
        touched = {kind: sum(bytes_of(x) for x in inputs if _key(x) in keys) for kind, keys in self._touched.items()}
        cost = Cost(0.0, passes * touched["read"], touched["written"] + sum(map(bytes_of, results)))
        self._count(name, place, cost, launches)
        for x in results:
            self.note(x, f"{name} {tuple(x.shape)} {str(x.dtype)[6:]}")
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = list(_leaves((args, tuple(kwargs.values()))))
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
            found = _ANSWERS[name](*args)
            self._count(name, place, cost_of(func, args, kwargs, found))
            for x in found if isinstance(found, tuple) else (found,):
                self.note(x, place)
            return found
        if name in ("_local_scalar_dense", "item", "equal", "is_nonzero"):
            self.syncs[f"{self.phase}: {name} {place}"] += 1
            return True if name in ("equal", "is_nonzero") else 1.0 if tensors[0].dtype.is_floating_point else 1
        if name in ("_to_copy", "copy_") and kinds == {"cuda", "cpu"} and not _non_blocking(name, args, kwargs):
            self.syncs[f"{self.phase}: pageable copy {place}"] += 1
        if "cuda" in kinds:
            one_row = name == "cumsum" and tensors[0].is_floating_point() and tensors[0].numel() == tensors[0].shape[-1]
            names = self.fixed if torch.are_deterministic_algorithms_enabled() else self.names
            names.add("cumsum of one row" if one_row else name)
        out = func(*args, **kwargs)
        if self._hidden:
            self._touch(func, args, kwargs)
        else:
            if "cuda" in kinds and name not in _VIEWS:
                self._count(name, place, cost_of(func, args, kwargs, out))
            for x in _leaves((out,)):
                if isinstance(x, torch.Tensor):
                    self.note(x, f"{place} {name} {tuple(x.shape)} {str(x.dtype)[6:]}")
        if name == "_varlen_attn_backward":
            self._mark(_flash_workspace(tensors))
        if name == "_scaled_dot_product_efficient_attention_backward":
            self._mark(4 * tensors[1].numel())  # sums of the gradients of queries in fp32
        return out

    def _count(self, name: str, place: str, cost: Cost, launches: int | None = None) -> None:
        launches = _LAUNCHES.get(name, 1) if launches is None else launches
        self.ops[self.phase][f"{name} {place}"] += 1
        self.launches[self.phase] += launches
        self.kernels[Kernel(self.phase, name, place, launches, cost)] += 1

    def _touch(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note the storages that an operation inside a compiled function reads and writes."""
        if func.overloadpacket.__name__ in _VIEWS:
            return
        for kind, tensors in zip(("read", "written"), read_and_written(func, args, kwargs), strict=True):
            self._touched[kind] |= {_key(x) for x in tensors}


def _non_blocking(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))


def _flash_workspace(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of flash attention's fp32 sums of dq, its row sums, and dk and dv of all query heads.

    Source: `mha_varlen_bwd` in ATen's flash_api.cpp.
    """
    query, key, borders = tensors[1], tensors[2], tensors[6]
    rows, heads, width = query.shape
    documents = len(borders) - 1
    rounded = rows + 128 * documents
    expanded = 2 * rows * heads * width * 2 if key.shape[1] != heads else 0
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    parts = -(-multiprocessors // (documents * heads)) if torch.are_deterministic_algorithms_enabled() else 1
    return parts * rounded * heads * width * 4 + heads * rounded * 4 + expanded


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


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
