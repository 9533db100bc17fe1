"""Offload saved tensors to main memory until backward, with copies in parallel to the computation."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Waiting:
    """A tensor in main memory, its copy on the device while it is fetched, and the tensor stored before it."""

    def __init__(self, host: Tensor, device: torch.device, before: _Waiting | None):
        self.host, self.device = host, device
        self.before = (lambda: None) if before is None else weakref.ref(before)
        self.fetched: Tensor | None = None
        self.arrived: torch.Event | None = None


class HostOffload:
    """Keep in main memory what autograd saves inside `with offload.hooks():`, until backward needs it.

    On CUDA, copies run on their own stream to and from pinned memory. A fetch also starts the fetch of the tensor
    stored before, which backward needs next. Tensors of other devices are copied synchronously.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: Callable[[], _Waiting | None] = lambda: None

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._store, self._fetch)

    def _store(self, tensor: Tensor) -> _Waiting:
        if tensor.device.type != "cuda":
            host = tensor.to("cpu", copy=True)
        else:
            side = self._stream(tensor.device)
            side.wait_stream(torch.cuda.current_stream(tensor.device))
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            with torch.cuda.stream(side):
                host.copy_(tensor.detach(), non_blocking=True)
            # The allocator reuses its memory only after the copy has read it.
            tensor.record_stream(side)
        waiting = _Waiting(host, tensor.device, self._last())
        # Only the graph holds it, so it is freed with the graph.
        self._last = weakref.ref(waiting)
        return waiting

    def _fetch(self, waiting: _Waiting) -> Tensor:
        if waiting.device.type != "cuda":
            return waiting.host.to(waiting.device)
        self._start_fetching(waiting)
        tensor, arrived = waiting.fetched, waiting.arrived
        assert tensor is not None and arrived is not None
        waiting.fetched = waiting.arrived = None
        if (before := waiting.before()) is not None:
            self._start_fetching(before)
        current = torch.cuda.current_stream(waiting.device)
        current.wait_event(arrived)
        tensor.record_stream(current)
        return tensor

    def _start_fetching(self, waiting: _Waiting) -> None:
        if waiting.fetched is None:
            side = self._stream(waiting.device)
            with torch.cuda.stream(side):
                waiting.fetched = waiting.host.to(waiting.device, non_blocking=True)
            waiting.arrived = side.record_event()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
