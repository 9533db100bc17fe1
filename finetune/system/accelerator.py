"""The accelerator of this process: the only file that asks torch for one, and what each kind of device can do.

Code elsewhere asks `on_gpu` (not the CPU), a capability of its `DeviceKind`, or `runtime` for torch's module of the
device. So a new kind of device is one entry of `KINDS`. This module imports no torch until a function needs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.system.machine import available_memory

if TYPE_CHECKING:
    import torch

# torch's name of GPUs of NVIDIA, and of AMD in its ROCm builds.
CUDA = "cuda"
# Device types whose tensors take main memory, or none.
_WITHOUT_ACCELERATOR = ("cpu", "meta")
# Places where Linux has a GPU: NVIDIA's driver, the same in WSL 2, and AMD's.
_DEVICE_FILES = ("nvidia[0-9]*", "dxg", "kfd")
_GRAPHICS = Path("/sys/class/drm")


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A kind of device, and what torch and the libraries can do there.

    name: in messages. refused: the reason why no run uses it; the CPU is used instead.
    untested: no test of this package ran on such a device.
    flash_attention: least compute capability with torch's flash attention; None: attention takes whatever torch has.
    attention_in_fp32: whether attention of bf16 runs in fp32 where there is no flash attention.
    packed_attention: torch has attention over documents of any length (`varlen_attn`).
    fp32_results: torch has products of 16-bit matrices with a result in fp32.
    dequantizes_in_place: bitsandbytes has a kernel that writes a dequantized 4-bit weight into a given buffer.
    pinned_copies: copies from and to pinned memory run beside the computation, on a stream of their own.
    """

    name: str
    refused: str = ""
    untested: bool = False
    flash_attention: tuple[int, int] | None = None
    attention_in_fp32: bool = False
    packed_attention: bool = False
    fp32_results: bool = False
    dequantizes_in_place: bool = False
    pinned_copies: bool = False


_CUDA_KIND: dict[str, Any] = {
    "flash_attention": (8, 0),
    "attention_in_fp32": True,
    "dequantizes_in_place": True,
    "pinned_copies": True,
}
# By torch's device type; "rocm" is CUDA in a ROCm build of torch.
KINDS = {
    "cpu": DeviceKind("CPU"),
    CUDA: DeviceKind("NVIDIA GPU (CUDA)", packed_attention=True, fp32_results=True, **_CUDA_KIND),
    "rocm": DeviceKind("AMD GPU (ROCm)", untested=True, **_CUDA_KIND),
    "xpu": DeviceKind("Intel GPU (XPU)", untested=True),
    "mps": DeviceKind("Apple GPU (MPS)", refused="it has no float64, in which ranks and plans exchange numbers"),
    "npu": DeviceKind("Ascend NPU", refused="bitsandbytes has no kernels for it"),
}


def kind_of(device_type: str) -> DeviceKind:
    """Return the kind of a device by torch's name of its type; a refused one if the type is unknown."""
    import torch

    if device_type == CUDA and torch.version.hip:
        return KINDS["rocm"]
    return KINDS.get(device_type) or DeviceKind(f"device {device_type}", refused="this package does not know it")


def found_accelerator() -> torch.device | None:
    """Return the accelerator that torch can use, of whatever kind; None without one."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True)


def default_device() -> torch.device:
    """Return the accelerator of this rank, or the CPU where there is none that runs can use."""
    import torch

    found = found_accelerator()
    if found is None or kind_of(found.type).refused:
        return torch.device("cpu")
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))


def device_warning() -> str | None:
    """Return a line about an accelerator that is not used, or that no test ran on; None for others."""
    found = found_accelerator()
    kind = kind_of("cpu" if found is None else found.type)
    if kind.refused:
        return f"device: cpu ({kind.name} is not used: {kind.refused})"
    return f"WARNING: device: {kind.name}: no test of this package ran on such a device" if kind.untested else None


def on_gpu(place: torch.Tensor | torch.device | str) -> bool:
    """Return whether a tensor, a device, or a device of this type has memory of its own."""
    device: Any = getattr(place, "device", place)
    return getattr(device, "type", device) not in _WITHOUT_ACCELERATOR


def table_key(place: torch.Tensor | torch.device | str) -> str:
    """Return the key of tables that have one value for the CPU and one for GPUs."""
    return "gpu" if on_gpu(place) else "cpu"


def runtime(device: torch.device) -> Any:
    """Return torch's module of a device: its memory, streams and properties, as torch.cuda or torch.xpu has them."""
    import torch

    return torch.get_device_module(device)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the CPU with its threads."""
    import torch

    return runtime(device).get_device_name(device) if on_gpu(device) else f"CPU, threads={torch.get_num_threads()}"


def free_bytes_of(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of main memory for the CPU."""
    return runtime(device).mem_get_info(device)[0] if on_gpu(device) else available_memory()


def has_flash_attention(device: torch.device) -> bool:
    """Return whether torch has flash attention for 16-bit values on a device."""
    least = kind_of(device.type).flash_attention
    return least is not None and runtime(device).get_device_capability(device) >= least


def release_caches() -> None:
    """Return the free memory of torch's allocator to the accelerator, if this process has used it."""
    if "torch" in sys.modules and (device := found_accelerator()) is not None:
        runtime(device).empty_cache()


def device_type_here() -> str:
    """Return the type of a GPU that Linux has and this process may see, else `cpu`, without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    found = any(True for pattern in _DEVICE_FILES for _ in Path("/dev").glob(pattern))
    return CUDA if found and not hidden else "cpu"


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A GPU as its driver reports it."""

    name: str
    total_bytes: int
    free_bytes: int


def device_memory() -> DeviceMemory | None:
    """Return the first visible GPU as its driver reports it, without a context on it; None without a GPU."""
    return _of_nvidia() or _of_amd()


def _of_nvidia() -> DeviceMemory | None:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]:
        command.append(f"--id={chosen}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        name, total, free = (word.strip() for word in done.stdout.splitlines()[0].rsplit(",", 2))
        return DeviceMemory(name, int(total) * 2**20, int(free) * 2**20)
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def _of_amd() -> DeviceMemory | None:
    """Read the files of the driver amdgpu: bytes as decimal numbers."""
    variables = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    chosen = next((os.environ[name] for name in variables if os.environ.get(name)), "0").split(",")[0]
    cards = sorted(_GRAPHICS.glob("card*/device/mem_info_vram_total"), key=lambda file: (len(str(file)), file))
    try:
        total = cards[int(chosen)]
        total_bytes, used_bytes = (
            int(total.with_name(f"mem_info_vram_{what}").read_text()) for what in ("total", "used")
        )
        product = total.with_name("product_name")
        name = product.read_text().strip() if product.is_file() else ""
        return DeviceMemory(name or "AMD GPU", total_bytes, total_bytes - used_bytes)
    except (OSError, ValueError, IndexError):
        return None
