"""The least time of a traced step on a GPU, from the operations and the bytes of each kernel.

A kernel takes the longest of its operations at the rate of its kind, its bytes at the bandwidth, and its launches.
Kernels run one after another. Not modeled: a host that is slower than the GPU, copies to and from main memory, caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Device:
    """Rates per second that large kernels reach. ceiling_flops: of the best bf16 product; shares are of it."""

    ceiling_flops: float
    matmul_flops: float
    attention_flops: float
    attention_backward_flops: float
    bytes: float
    launch_seconds: float = 2.5e-6


# 71 % of an H200's data sheet for products (989e12) and 83 % for bytes (4.8e12); attention is flash attention 2.
DEVICES = {
    "h200": Device(7.88e14, 7.0e14, 3.5e14, 2.8e14, 4.0e12),
    "4090": Device(1.65e14, 1.55e14, 1.4e14, 1.1e14, 0.86e12),
}
_ATTENTION = ("attn", "attention")
# Operations that write a tensor without reading it.
_OVERWRITES = {"copy_", "fill_", "zero_", "bernoulli_", "uniform_", "normal_", "random_"}
# Operations that read as much of their first tensor as they return, or change as much of it as their last one has.
_GATHERS = {"index", "index_select", "embedding", "gather"}
_SCATTERS = {"index_put_", "_index_put_impl_", "index_add_", "index_copy_", "scatter_", "scatter_add_"}


class Cost(NamedTuple):
    """What a kernel does: floating-point operations, and bytes of GPU memory that it reads and writes."""

    flops: float
    read: int
    written: int


class Kernel(NamedTuple):
    """A kernel, or a few of one operation. place: the line of the package that launches it."""

    phase: str
    name: str
    place: str
    launches: int
    cost: Cost

    @property
    def kind(self) -> str:
        if self.phase == "optimizer":
            return "optimizer"
        if any(word in self.name for word in _ATTENTION):
            return "attention"
        if "dequantize" in self.name:
            return "dequantize"
        return "matmul" if self.cost.flops else "elementwise"

    def seconds(self, device: Device) -> float:
        rate = device.matmul_flops
        if self.kind == "attention":
            rate = device.attention_backward_flops if "backward" in self.name else device.attention_flops
        moved = self.cost.read + self.cost.written
        return max(self.cost.flops / rate, moved / device.bytes, self.launches * device.launch_seconds)


def seconds_by(field: str, kernels: Mapping[Kernel, int], device: Device) -> dict[str, float]:
    """Return ideal seconds by `kind` or `phase`. kernels: how often each one runs."""
    found: dict[str, float] = {}
    for kernel, count in kernels.items():
        key = getattr(kernel, field)
        found[key] = found.get(key, 0.0) + count * kernel.seconds(device)
    return found


def cost_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Cost:
    """Return the cost of an operation of torch on its tensors in GPU memory."""
    name = func.overloadpacket.__name__
    read, written = ([bytes_of(x) for x in tensors] for tensors in read_and_written(func, args, kwargs))
    results = [bytes_of(x) for x in gpu_tensors((out,))]
    if not func._schema.is_mutable:
        written += results
    if name in _GATHERS:
        read[0] = results[0]
    if name in _SCATTERS:
        written[0] = read[-1]
        read[0] = written[0] if name == "index_add_" or args[-1] is True else 0
    return Cost(_flops(func, args, kwargs, out), sum(read), sum(written))


def read_and_written(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the tensors that an operation reads and those that it writes; those that it changes are in both."""
    overwrites = func.overloadpacket.__name__ in _OVERWRITES
    read: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        tensors = list(gpu_tensors((args[i] if i < len(args) else kwargs.get(argument.name),)))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written += tensors
        if not changed or (argument.name != "out" and not overwrites):
            read += tensors
    return read, written


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    name = func.overloadpacket.__name__
    if name.startswith("_varlen_attn"):
        backward = name.endswith("backward")
        query = args[1] if backward else args[0]
        longest = args[8] if backward else args[5]
        # Two products of L x L x width forward and five backward, of which the causal mask leaves half.
        return (5.0 if backward else 2.0) * longest * query.numel()
    counter = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), func.overloadpacket))  # addmm_ is an addmm
    return float(counter(*args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=out)) if counter else 0.0


def gpu_tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the GPU's tensors of nested sequences."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.device.type == "cuda":
                yield value
        elif isinstance(value, (list, tuple)):
            yield from gpu_tensors(value)


def bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's values; those that an expanded dimension repeats count once."""
    values = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        values *= size if stride or not size else 1
    return values * tensor.element_size()
