"""Offloaded tensors come back unchanged however late their copies run, and main memory holds no more than needed."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.models import offload
from finetune.models.offload import CopyQueue, HostOffload, PinnedMemory
from finetune.system.errors import ResourceError

CPU = torch.device("cpu")
LAYERS = 5


class LateCopies:
    """A device whose copies run as late as CUDA allows: when a stream waits for their event.

    running: copies begun and not waited for. most: the most at a time. begun: per copy, "in" or "out".
    """

    def __init__(self) -> None:
        self.running: list = []
        self.begun: list[str] = []
        self.most = self.count = self.ordered = 0
        self.buffers: list[torch.Tensor] = []
        self.unpinned: list[int] = []

    def pin(self, device, size_bytes):
        self.buffers.append(torch.empty(size_bytes, dtype=torch.uint8))
        return self.buffers[-1], lambda: self.unpinned.append(size_bytes)

    def begin(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert self.ordered == len(self.begun) + 1, "a copy must wait for what the compute stream did before"
        out = any(target.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for b in self.buffers)
        # Other Python objects for the pinned memory: its owner may free it. The device's memory must be held.
        pinned, held = (target, source) if out else (source, target)
        self.running.append((pinned.view_as(pinned), weakref.ref(held), out))
        self.begun.append("out" if out else "in")
        self.most = max(self.most, len(self.running))

    def run_until(self, event: int) -> None:
        while self.count < event:
            pinned, held, out = self.running.pop(0)
            tensor = held()
            assert tensor is not None, "memory of the device was freed before its copy ended"
            (pinned if out else tensor).copy_(tensor if out else pinned)
            self.count += 1

    def stream(self, *_):
        def wait_stream(other):
            self.ordered = len(self.begun) + 1

        return SimpleNamespace(
            wait_stream=wait_stream,
            record_event=lambda: len(self.begun),
            wait_event=lambda event: self.run_until(event),
        )


class _OnStream(TorchDispatchMode):
    def __init__(self, device: LateCopies) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is not torch.ops.aten.copy_:
            return func(*args, **(kwargs or {}))
        self.device.begin(*args[:2])
        return args[0]


@pytest.fixture
def device(monkeypatch) -> LateCopies:
    made = LateCopies()
    streams = SimpleNamespace(Stream=made.stream, current_stream=made.stream, stream=lambda _: _OnStream(made))
    monkeypatch.setattr(offload, "runtime", lambda _: streams)
    monkeypatch.setattr(offload, "pin_memory", made.pin)
    return made


def forward(x: torch.Tensor, queue: CopyQueue | None) -> torch.Tensor:
    """Return a function of x whose graph saves LAYERS tensors of x's size."""
    y = x.clone()
    for _ in range(LAYERS):
        if queue is None:
            y = y.pow(2).sin()
        else:
            with saved_tensors_hooks(queue.store, queue.fetch):
                y = y.pow(2)
            y = y.sin()
    return y.sum()


def expected(x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(forward(x, None), x)[0]


def inputs(count: int = 3, size: int = 100) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, requires_grad=True) for _ in range(count)]


def test_gradients_are_exact_with_at_most_two_copies_at_a_time(device):
    queue = CopyQueue(CPU, LAYERS)
    for x in inputs():
        forward(x, queue).backward()
        assert torch.equal(x.grad, expected(x))
    assert device.most == 2
    # The tensor stored last is still on the device. Each fetch begins the next one.
    assert device.begun == (["out"] * LAYERS + ["in"] * (LAYERS - 1)) * 3
    assert not device.running


def test_a_fetch_begins_the_fetch_of_the_tensor_stored_before(device):
    queue = CopyQueue(CPU, LAYERS)
    stored = [queue.store(x.detach()) for x in inputs(3)]
    queue.fetch(stored[2])
    assert device.begun == ["out"] * 3 + ["in"] and len(device.running) == 1
    queue.fetch(stored[1])
    assert device.begun == ["out"] * 3 + ["in"] * 2


def test_graphs_of_any_order_are_exact(device):
    """Two graphs alive, a graph freed without backward, a backward pass twice, and one that ends midway."""
    queue = CopyQueue(CPU, LAYERS)
    a, b, c = inputs()
    first, second = forward(a, queue), forward(b, queue)
    dropped = forward(c, queue)
    del dropped
    first.backward(retain_graph=True)
    third = forward(c, queue)
    second.backward()
    first.backward()
    third.backward()
    for x, times in ((a, 2), (b, 1), (c, 1)):
        assert torch.equal(x.grad, times * expected(x))
    stored = [queue.store(x.detach()) for x in inputs(3)]
    queue.fetch(stored[2])  # begins to fetch the one before, which nobody takes
    del stored
    a.grad = None
    forward(a, queue).backward()
    assert torch.equal(a.grad, expected(a))


def test_one_buffer_of_exact_size_serves_all_steps_and_grows(device):
    queue = CopyQueue(CPU, LAYERS)
    for x in inputs(4):
        forward(x, queue).backward()
    assert [len(buffer) for buffer in device.buffers] == [LAYERS * 448]  # 400 bytes, aligned
    (smaller,), (larger,) = inputs(1, 50), inputs(1, 200)
    forward(smaller, queue).backward()
    assert len(device.buffers) == 1
    forward(larger, queue).backward()
    assert torch.equal(larger.grad, expected(larger))
    assert len(device.buffers) == 2 and len(device.buffers[1]) == LAYERS * 832
    assert device.unpinned == [LAYERS * 448]


def test_two_graphs_have_a_buffer_each_and_both_are_freed_with_their_owner(device):
    queue = CopyQueue(CPU, LAYERS)
    for _ in range(3):
        a, b = inputs(2)
        first, second = forward(a, queue), forward(b, queue)
        first.backward()
        second.backward()
    assert len(device.buffers) == 2 and device.unpinned == []
    del queue, first, second
    gc.collect()
    assert device.unpinned == [LAYERS * 448] * 2


def test_a_slot_returns_when_its_tensor_is_freed(device):
    pinned = PinnedMemory(CPU, 2)
    x = torch.zeros(16)
    a, b = pinned.take(x), pinned.take(x)
    assert b.data_ptr() - a.data_ptr() == 64
    a.fill_(1), b.fill_(2)
    c = pinned.take(x)
    assert len(device.buffers) == 2, "both slots are in use"
    places = {a.data_ptr(), b.data_ptr()}
    del a, b
    assert pinned.take(x).data_ptr() in places and c.shape == x.shape


def test_memory_is_pinned_in_exact_size_and_unpinned_once(monkeypatch):
    calls = []
    cudart = SimpleNamespace(
        cudaHostRegister=lambda *args: calls.append(("pin", *args)) or 0,
        cudaHostUnregister=lambda *args: calls.append(("unpin", *args)) or 0,
    )
    runtime = SimpleNamespace(cudart=lambda: cudart, synchronize=lambda device: calls.append(("wait", device)))
    monkeypatch.setattr(offload, "runtime", lambda _: runtime)
    memory = PinnedMemory(CPU, 3)
    slot = memory.take(torch.zeros(32))
    assert calls == [("pin", slot.data_ptr(), 3 * 128, 1)]
    address = slot.data_ptr()
    del slot, memory
    gc.collect()
    assert calls[1:] == [("wait", CPU), ("unpin", address)]


@pytest.mark.parametrize(("free", "code"), [(10**9, 2), (100, 0)])
def test_too_little_main_memory_is_an_error_that_names_the_setting(free, code, monkeypatch):
    cudart = SimpleNamespace(cudaHostRegister=lambda *_: code)
    monkeypatch.setattr(offload, "runtime", lambda _: SimpleNamespace(cudart=lambda: cudart))
    monkeypatch.setattr(offload, "available_memory", lambda: free)
    with pytest.raises(ResourceError, match=r"^train\.gradient_checkpointing=offload: "):
        offload.pin_memory(CPU, 1000)


def test_tensors_of_a_cpu_are_copied_and_freed_with_their_graph():
    kept = HostOffload(1)
    x = torch.ones(3, requires_grad=True)
    with kept.hooks():
        y = x * 2
        square = y.pow(2)
    y.detach().zero_()
    square.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [8, 8, 8]
