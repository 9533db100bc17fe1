"""Keep tensors that autograd saves in main memory until the backward pass needs them."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from finetune.system.accelerator import kind_of, runtime
from finetune.system.errors import OutOfMemory
from finetune.system.format import format_bytes
from finetune.system.machine import available_memory

# A slot of pinned memory begins at a multiple of this.
_ALIGNMENT = 64
# Pinned for every GPU of the process (cudaHostRegisterPortable).
_PORTABLE = 1


@dataclass(eq=False)
class _Waiting:
    """A tensor in main memory, and its copy on the device while there is one.

    before: returns the tensor stored before it, while that is alive.
    """

    host: Tensor
    device: torch.device
    before: Callable[[], _Waiting | None] = lambda: None
    on_device: Tensor | None = None


class HostOffload:
    """Keep in main memory what autograd saves inside `with offload.hooks():`, until backward needs it.

    On CUDA and ROCm, copies run on a stream of their own, to and from pinned memory. Tensors of other devices are
    copied synchronously.

    Device memory: at most two tensors, each held until its copy ends. The last stored tensor stays on the device until
    the next store or fetch, so backward begins without a copy.
    Pinned memory: `tensors` times the largest tensor, once for each graph that is alive at a time. It is kept between
    steps and freed with this object. A tensor's slot returns when autograd frees the tensor.

    tensors: how many tensors of one size a forward pass stores.
    """

    def __init__(self, tensors: int) -> None:
        self._tensors = tensors
        self._queues: dict[torch.device, CopyQueue] = {}

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._store, self._fetch)

    def _store(self, tensor: Tensor) -> _Waiting:
        if not kind_of(tensor.device.type).pinned_copies:
            return _Waiting(tensor.to("cpu", copy=True), tensor.device)
        if tensor.device not in self._queues:
            self._queues[tensor.device] = CopyQueue(tensor.device, self._tensors)
        return self._queues[tensor.device].store(tensor)

    def _fetch(self, waiting: _Waiting) -> Tensor:
        if not kind_of(waiting.device.type).pinned_copies:
            return waiting.host.to(waiting.device)
        return self._queues[waiting.device].fetch(waiting)


class CopyQueue:
    """Copies between one device and pinned memory, one after the other on a stream of their own.

    A tensor on the device is held until the compute stream has waited for its copy. `record_stream` would let the host,
    which is ahead of the device, allocate new memory for every layer before the first copy ends.
    """

    def __init__(self, device: torch.device, tensors: int) -> None:
        self._device, self._runtime = device, runtime(device)
        self._side = self._runtime.Stream(device)
        self._pinned = PinnedMemory(device, tensors)
        self._running: deque[tuple[Tensor, Any]] = deque()
        # Weak: only the graph holds a stored tensor, which is freed with it.
        self._last: Callable[[], _Waiting | None] = lambda: None

    def store(self, tensor: Tensor) -> _Waiting:
        """Begin to copy a tensor to main memory. Raises: OutOfMemory if that cannot hold it."""
        if (before := self._last()) is not None:
            before.on_device = None
        on_device = tensor.detach()
        waiting = _Waiting(self._pinned.take(tensor), self._device, self._last, on_device)
        self._copy(waiting.host, on_device, held=on_device)
        self._wait(running=1)
        self._last = weakref.ref(waiting)
        return waiting

    def fetch(self, waiting: _Waiting) -> Tensor:
        """Return the tensor on the device, and begin to fetch the one stored before, which backward needs next."""
        tensor = self._bring(waiting)
        self._wait(running=0)
        waiting.on_device = None
        if (before := waiting.before()) is not None:
            self._bring(before)
        return tensor

    def _bring(self, waiting: _Waiting) -> Tensor:
        if waiting.on_device is None:
            # Allocated and freed on the compute stream, so its memory is reused in the order of that stream.
            waiting.on_device = torch.empty_like(waiting.host, device=self._device)
            self._copy(waiting.on_device, waiting.host, held=waiting.on_device)
        return waiting.on_device

    def _copy(self, target: Tensor, source: Tensor, held: Tensor) -> None:
        self._side.wait_stream(self._runtime.current_stream(self._device))
        with self._runtime.stream(self._side):
            target.copy_(source, non_blocking=True)
        self._running.append((held, self._side.record_event()))

    def _wait(self, running: int) -> None:
        """Let the compute stream wait until at most so many copies run."""
        while len(self._running) > running:
            _, done = self._running.popleft()
            self._runtime.current_stream(self._device).wait_event(done)


class PinnedMemory:
    """Slots for the tensors of a forward pass, in buffers that are kept.

    The first tensor of a pass reserves room for all. Buffers without a tensor are freed once they are too small.
    """

    def __init__(self, device: torch.device, tensors: int) -> None:
        self._device, self._tensors = device, tensors
        self._buffers: list[_Buffer] = []

    def take(self, tensor: Tensor) -> Tensor:
        """Return an uninitialized tensor like this one; its slot returns when the result is freed."""
        whole_pass = self._tensors * _aligned(tensor.nbytes)
        for buffer in self._buffers:
            if buffer.room >= (tensor.nbytes if buffer.slots else whole_pass):
                return buffer.take(tensor)
        self._buffers = [buffer for buffer in self._buffers if buffer.slots]
        self._buffers.append(_Buffer(self._device, whole_pass))
        return self._buffers[-1].take(tensor)


class _Buffer:
    """Pinned memory that is handed out from its start again once all of its slots are free.

    A freed slot may still be read by a copy. That is safe: a later copy into it runs on the same stream.
    """

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        self._memory, unpin = pin_memory(device, size_bytes)
        weakref.finalize(self, unpin).atexit = False  # type: ignore[missing-attribute] # a process ends with its memory
        self._used = 0
        self.slots: weakref.WeakSet[Tensor] = weakref.WeakSet()

    @property
    def room(self) -> int:
        """Return the bytes that are left."""
        return len(self._memory) - (self._used if self.slots else 0)

    def take(self, tensor: Tensor) -> Tensor:
        start = len(self._memory) - self.room
        self._used = start + _aligned(tensor.nbytes)
        slot = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.slots.add(slot)
        return slot


def pin_memory(device: torch.device, size_bytes: int) -> tuple[Tensor, Callable[[], None]]:
    """Return exactly so many bytes of pinned memory, and a function that unpins them.

    torch's own pinned memory is rounded up to a power of two, and is not returned to the system.

    Raises:
        OutOfMemory: main memory cannot hold it.
    """
    wanted, free = f"needs {format_bytes(size_bytes)} of pinned main memory", available_memory()
    where = "train.gradient_checkpointing=offload"
    advice = "help: lower data.max_length or train.micro_batch_size, or set train.gradient_checkpointing=all"
    # Pinning loads every page. The system would end the process where memory does not suffice.
    if size_bytes > free:
        raise OutOfMemory(f"{where}: {wanted}, {format_bytes(free)} is free\n{advice}")
    memory = torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
    cudart: Any = runtime(device).cudart()
    if code := int(cudart.cudaHostRegister(memory.data_ptr(), size_bytes, _PORTABLE)):
        raise OutOfMemory(f"{where}: {wanted}, and CUDA refused it with error {code}\n{advice}")
    return memory, partial(_unpin, cudart, device, memory.data_ptr())


def _unpin(cudart: Any, device: torch.device, address: int) -> None:
    runtime(device).synchronize(device)  # copies may still run
    cudart.cudaHostUnregister(address)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
