"""Weights out of safetensors files, the next layer's while this one computes.

On a CPU a layer's tensors are mapped, and threads touch their pages before they are needed: a page that the system has
cached costs next to nothing, where a copy of it takes a core from the products. A GPU's are read into pinned memory.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from finetune.models.safetensors_index import Stored, check_reaches, map_tensor, read_exactly

# Reads in flight: a fast disk is busy only with several, and more than it needs cost nothing.
_THREADS = 4
_PIECE_BYTES = 4 << 20
# Rows of a table that one task reads, one read each.
_ROWS = 256
# At most as large as any system's pages.
_PAGE_BYTES = 4 << 10
# What torch's own allocations are aligned to: a product's rounding may depend on it.
_ALIGNMENT = 64


class Reads:
    """Threads that fill tensors from files. Leaving the block drops what has not begun and waits for the rest.

    bytes: read so far.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="teacher-reader")
        self._lock = threading.Lock()
        self._spans: list[tuple[float, float]] = []
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def weight(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, list[Future[None]]]:
        """A stored tensor as `dtype` on the CPU, not to be written to, which is there once the futures are done.

        Mapped where the file has it in this type. Raises, at once or from each future: IntegrityError if the file ends
        too early; OSError.
        """
        if stored.dtype != dtype:
            out = torch.empty(stored.shape, dtype=dtype)
            return out, self.tensor(stored, out)
        mapped = map_tensor(stored)
        raw = mapped.view(-1).view(torch.uint8)
        starts = range(0, len(raw), _PIECE_BYTES)
        return mapped, [self._threads.submit(self._touch, stored, raw, start) for start in starts]

    def tensor(self, stored: Stored, out: Tensor) -> list[Future[None]]:
        """Begins to fill `out`, contiguous on the CPU; numbers of another type than its are converted on arrival.

        Raises, from each future: IntegrityError if the file ends too early; OSError.
        """
        flat, size = out.view(-1), stored.dtype.itemsize
        step = _PIECE_BYTES // size
        return [
            self._threads.submit(self._fill, stored, [(stored.offset + start * size, flat[start : start + step])])
            for start in range(0, flat.numel(), step)
        ]

    def rows(self, stored: Stored, rows_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows [N, D] of a stored table [V, D], read now."""
        out_ND = torch.empty(len(rows_N), stored.shape[1], dtype=dtype)
        row_bytes = stored.shape[1] * stored.dtype.itemsize
        places = [(stored.offset + row * row_bytes, out_D) for row, out_D in zip(rows_N.tolist(), out_ND, strict=True)]
        pending = [
            self._threads.submit(self._fill, stored, places[start : start + _ROWS])
            for start in range(0, len(places), _ROWS)
        ]
        for future in pending:
            future.result()
        return out_ND

    def seconds(self) -> float:
        """Time during which at least one read was going on."""
        total, until = 0.0, -math.inf
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total

    def _fill(self, stored: Stored, places: list[tuple[int, Tensor]]) -> None:
        began, count = time.perf_counter(), 0
        with stored.file.open("rb", buffering=0) as stream:
            for offset, out in places:
                raw = out if out.dtype == stored.dtype else torch.empty(out.shape, dtype=stored.dtype)
                read_exactly(stream, offset, raw.view(torch.uint8).numpy().data, stored.file)
                if raw is not out:
                    out.copy_(raw)
                count += raw.nbytes
        self._note(began, count)

    def _touch(self, stored: Stored, raw: Tensor, start: int) -> None:
        """One piece of a mapped tensor's bytes, so that its pages are there."""
        began, piece = time.perf_counter(), raw[start : start + _PIECE_BYTES]
        # What a file lacks would end the process, not raise.
        check_reaches(stored.file, stored.offset + start + len(piece))
        piece[::_PAGE_BYTES].sum()
        self._note(began, len(piece))

    def _note(self, began: float, count: int) -> None:
        with self._lock:
            self._spans.append((began, time.perf_counter()))
            self.bytes += count


class LayerPair:
    """Two layers of a model: the one that computes and the next, which is read meanwhile. Layer i has half i % 2."""

    def __init__(self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device):
        """shapes: of one layer's tensors by name within it, the same for every layer."""
        if device.type == "cuda":
            self._halves = [_PinnedHalf(shapes, dtype, device) for _ in range(2)]
        else:
            self._halves = [_MappedHalf(dtype) for _ in range(2)]

    def begin(self, layer: int, tensors: Mapping[str, Stored], reads: Reads) -> None:
        """Starts reading a layer; the one that had this half must have been released."""
        self._halves[layer % 2].begin(tensors, reads)

    def take(self, layer: int) -> dict[str, Tensor]:
        """A layer's tensors on the device once they are there; valid until `release`.

        Raises: what went wrong in reading it.
        """
        return self._halves[layer % 2].take()

    def release(self, layer: int) -> None:
        """Everything that computes with the layer has been called, and nothing refers to its tensors any more."""
        self._halves[layer % 2].release()


class _MappedHalf:
    """A layer on the CPU, where it lies in the system's cache: no copy of it is made."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._tensors: dict[str, Tensor] = {}
        self._pending: list[Future[None]] = []

    def begin(self, tensors: Mapping[str, Stored], reads: Reads) -> None:
        weights = {name: reads.weight(stored, self._dtype) for name, stored in tensors.items()}
        self._tensors = {name: tensor for name, (tensor, _) in weights.items()}
        self._pending = [piece for _, pieces in weights.values() for piece in pieces]

    def take(self) -> dict[str, Tensor]:
        for piece in self._pending:
            piece.result()
        return self._tensors

    def release(self) -> None:
        self._tensors, self._pending = {}, []


class _PinnedHalf:
    """Pinned memory that a layer is read into, and its copy on the GPU, made on a stream of its own."""

    def __init__(self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device):
        room = {name: _aligned(shape.numel() * dtype.itemsize) for name, shape in shapes.items()}
        self._memory = torch.empty(sum(room.values()), dtype=torch.uint8, pin_memory=True)
        self._on_gpu = torch.empty_like(self._memory, device=device)
        self._tensors, self._gpu_tensors = (
            {
                name: part[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
                for part, (name, shape) in zip(memory.split(list(room.values())), shapes.items(), strict=True)
            }
            for memory in (self._memory, self._on_gpu)
        )
        self._pending: list[Future[None]] = []
        self._stream = torch.cuda.Stream(device)
        self._copied, self._computed = torch.cuda.Event(), torch.cuda.Event()
        self._computed.record(torch.cuda.current_stream(device))

    def begin(self, tensors: Mapping[str, Stored], reads: Reads) -> None:
        # The pinned half still feeds the copy of the layer before.
        self._copied.synchronize()
        self._pending = [
            piece for name, stored in tensors.items() for piece in reads.tensor(stored, self._tensors[name])
        ]

    def take(self) -> dict[str, Tensor]:
        for piece in self._pending:
            piece.result()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._computed)
            self._on_gpu.copy_(self._memory, non_blocking=True)
            self._copied.record(self._stream)
        torch.cuda.current_stream(self._on_gpu.device).wait_event(self._copied)
        return self._gpu_tensors

    def release(self) -> None:
        self._pending = []
        self._computed.record(torch.cuda.current_stream(self._on_gpu.device))


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
