"""An accelerator that torch does not know, made of main memory: no compiler, no GPU.

    python -m tests.fake_device train config=quickstart.yaml …    a command of finetune on this device

torch lets Python code be the backend `PrivateUse1`. A tensor of it holds a CPU tensor; each operation runs on that.
Mixing it with tensors of the CPU is an error, as on a GPU. It has no flash attention, no streams and no compiler.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "toy"
DEVICE = torch.device("cpu")  # until `install`
MEMORY_BYTES = 4 * 10**9
# Operations that read a value, or copy between devices.
_ACROSS = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_SETTINGS = {"device", "layout", "pin_memory"}


class ToyTensor(torch.Tensor):
    """A tensor on the toy device; `inner` is the CPU tensor with its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> ToyTensor:
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=DEVICE, **options)
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"toy {self.inner!r}"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _ACROSS:
            _check_devices(func, tree_flatten((args, kwargs))[0])
        if func is torch.ops.aten._fused_sdp_choice.default:
            return 0  # plain products
        placed = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        if placed is not None:
            inner_kwargs["device"] = torch.device("cpu")
        found = func(*inner_args, **inner_kwargs)
        stays = placed is None or placed.type == NAME
        if stays and not (func is torch.ops.aten.copy_.default and not isinstance(args[0], ToyTensor)):
            found = tree_map(lambda x: ToyTensor(x) if isinstance(x, torch.Tensor) else x, found)
        return return_and_correct_aliasing(func, args, kwargs, found)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, ToyTensor) else value


def _check_devices(func: Any, values: list[Any]) -> None:
    """Raise RuntimeError for a CPU tensor that is no single number."""
    for value in values:
        if isinstance(value, torch.Tensor) and not isinstance(value, ToyTensor) and value.dim():
            raise RuntimeError(f"{func}: found tensors on {NAME} and on {value.device}")


def _empty(size: Any, **options: Any) -> ToyTensor:
    kept = {name: value for name, value in options.items() if name not in _SETTINGS and value is not None}
    return ToyTensor(torch.empty(size, device="cpu", **kept))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> ToyTensor:
    return ToyTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: torch.Tensor, target: torch.Tensor, *_: Any) -> torch.Tensor:
    """Copy where torch makes a tensor of a list, below the level of `__torch_dispatch__`."""
    _inner(target).copy_(_inner(source))
    return target


class _Module:
    """What torch.cuda is for CUDA."""

    is_available = is_initialized = is_bf16_supported = staticmethod(lambda **_: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = synchronize = empty_cache = manual_seed_all = set_rng_state = staticmethod(lambda *_: None)
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    get_device_name = staticmethod(lambda *_: "Toy 4GB")
    get_device_properties = staticmethod(lambda *_: SimpleNamespace(name="Toy 4GB", total_memory=MEMORY_BYTES))
    mem_get_info = staticmethod(lambda *_: (MEMORY_BYTES, MEMORY_BYTES))
    memory_allocated = memory_reserved = max_memory_allocated = staticmethod(lambda *_: 10**6)


class Params4bit(ToyTensor):
    """A toy tensor with the name and the attributes of bitsandbytes' parameter, which no subclass can become."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, requires_grad: bool = False, **options: Any) -> Any:
        if not isinstance(data, ToyTensor):
            return bnb.nn.modules.Params4bit(data, requires_grad=requires_grad, **options)
        made = torch.nn.Parameter(data, requires_grad=False)
        made.__class__ = Params4bit
        vars(made).update(options)
        return made


_LIBRARIES = []


def install() -> torch.device:
    """Give this process the toy device, once, and let the package know its kind."""
    global DEVICE
    from finetune.system import accelerator

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    DEVICE = torch.device(NAME, 0)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _LIBRARIES.append(library)
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    bnb.nn.Params4bit = Params4bit
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)
    accelerator.KINDS[NAME] = accelerator.DeviceKind("toy device", untested=True)
    return DEVICE


def main() -> int:
    install()
    from finetune.cli import main as finetune

    return finetune(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
