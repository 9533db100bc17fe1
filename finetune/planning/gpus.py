"""The device that a plan is for: a known GPU by its data sheet, a size of memory, or this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from finetune.planning.auto_batch import free_memory
from finetune.planning.inputs import GpuTraits
from finetune.system.accelerator import CUDA, device_memory, device_type_here
from finetune.system.errors import InputError


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that is sold.

    name: with the size of its memory if the card comes with several. memory_bytes: as sold, in 10^9 bytes per GB.
    flops_per_second: dense bf16 products with fp32 sums; fp16 if the card has no bf16.
    """

    name: str
    memory_bytes: float
    flops_per_second: float


# Name -> sizes in GB, peak in 10^12 operations per second, multiprocessors, GB/s between GPUs of a node in one
# direction (NVLink, else PCIe with 16 lanes: 3.0 of a T4, 4.0 of others).
# A name stands before its beginnings: L40S before L4.
_KNOWN = {
    "H200": ((141,), 989, 132, 450),
    "H100": ((80,), 989, 132, 450),
    "A100": ((40, 80), 312, 108, 300),
    "L40S": ((48,), 362, 142, 32),
    "A6000": ((48,), 155, 84, 32),
    "A10": ((24,), 125, 72, 32),
    "L4": ((24,), 121, 58, 32),
    "4090": ((24,), 165, 128, 32),
    "3090": ((24,), 71, 82, 32),
    "V100": ((16, 32), 125, 80, 150),
    "T4": ((16,), 65, 40, 16),
}
_BEFORE_AMPERE = ("V100", "T4")
# A driver reports more bytes than are sold, and keeps a part for itself: the sold size is close to what is free.
_BYTES_PER_GB = 1e9
_WORD = re.compile(r"(?:NVIDIA|GEFORCE|TESLA|RTX|[ _-])*([A-Z]*\d+S?)(?:[ _-]*(\d+)(?:GB)?)?")


def find_gpu(word: str) -> Gpu:
    """Return the GPU of a word such as `4090`, `t4`, `RTX 3090` or `a100-80`.

    Raises: InputError if no GPU or several have this name.
    """
    found = _WORD.fullmatch(word.strip().upper())
    name, size = (found[1], found[2]) if found else ("", None)
    if name not in _KNOWN:
        known = ", ".join(choice for each in _KNOWN for choice in _choices(each))
        size_gb = word if word.isdecimal() and int(word) < 1000 else "24"
        raise InputError(f"gpu={word}: unknown; known are {known}\nhelp: gpu_gb={size_gb}")
    sizes, peak, *_ = _KNOWN[name]
    if (size is None and len(sizes) > 1) or (size is not None and int(size) not in sizes):
        each = " or ".join(f"{gb} GB" for gb in sizes)
        raise InputError(f"gpu={word}: this card has {each}\nhelp: gpu={_choices(name)[-1]}")
    memory_gb = int(size or sizes[0])
    full_name = f"{name} {memory_gb}GB" if len(sizes) > 1 else name
    return Gpu(full_name, memory_gb * _BYTES_PER_GB, peak * 1e12)


def peak_of(gpu_name: str | None) -> float | None:
    """Return the operations per second of a GPU by its driver's name, as `Tesla T4`; None if it is unknown."""
    name = _known_name(gpu_name)
    return None if name is None else _KNOWN[name][1] * 1e12


def link_bytes_of(gpu_name: str | None) -> float | None:
    """Return the bytes per second between GPUs of a node, in one direction; None for an unknown GPU."""
    name = _known_name(gpu_name)
    return None if name is None else _KNOWN[name][3] * 1e9


def traits_of(gpu_name: str | None) -> GpuTraits:
    """Return what the plan needs to know about a GPU by its driver's name; the defaults if it is unknown."""
    name = _known_name(gpu_name)
    return GpuTraits() if name is None else GpuTraits(name not in _BEFORE_AMPERE, _KNOWN[name][2])


def _known_name(gpu_name: str | None) -> str | None:
    return next((name for name in _KNOWN if gpu_name and name in gpu_name), None)


def _choices(name: str) -> list[str]:
    sizes = _KNOWN[name][0]
    return [f"{name.lower()}-{gb}" for gb in sizes] if len(sizes) > 1 else [name.lower()]


class PlannedDevice(NamedTuple):
    """kind: device type of torch. free_bytes: None if unknown. gpu_name: None for a CPU or an unnamed GPU."""

    kind: str
    free_bytes: float | None
    description: str
    gpu_name: str | None


def planned_device(gpu: str | None, gpu_gb: float | None) -> PlannedDevice:
    """Return the device of the options gpu= and gpu_gb=; without them, that of this machine.

    Raises: InputError if both are given, or the GPU is unknown.
    """
    if gpu is not None and gpu_gb is not None:
        wrong = f"gpu={gpu} and gpu_gb={gpu_gb:g}: the memory is given twice"
        raise InputError(f"{wrong}\nhelp: drop gpu_gb, or drop gpu")
    if gpu is not None:
        known = find_gpu(gpu)
        return PlannedDevice(CUDA, known.memory_bytes, known.name, known.name)
    if gpu_gb is not None:
        return PlannedDevice(CUDA, gpu_gb * 1e9, f"a GPU of {gpu_gb:g} GB", None)
    kind = device_type_here()
    if kind == "cpu":
        return PlannedDevice(kind, free_memory(kind), "this machine's memory", None)
    here = device_memory()
    name = here.name if here else None
    return PlannedDevice(kind, free_memory(kind), name or "this machine's GPU", name)
