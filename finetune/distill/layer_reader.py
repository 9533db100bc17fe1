"""Read the next layer's weights from safetensors files while the current layer computes.

On a CPU the tensors are mapped, and threads touch their pages in advance: a cached page costs almost nothing, while a
copy would take a core from the matrix products. For a GPU they are read into pinned memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from finetune.models.safetensors_index import Stored, check_reaches, map_tensor, read_exactly
from finetune.system.accelerator import kind_of, runtime

# Concurrent reads: a fast disk needs several, and more than it needs cost nothing.
_THREADS = 4
_PIECE_BYTES = 4 << 20
# Rows of a table per task, one read each.
_ROWS = 256
# No system has smaller pages.
_PAGE_BYTES = 4 << 10
# Alignment of torch's allocations, on which the rounding of a matrix product may depend.
_ALIGNMENT = 64


class Reads:
    """Threads that fill tensors from files. On exit, reads that have not begun are dropped. bytes: requested so far."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="teacher-reader")
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def weight(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, list[Future[None]]]:
        """Return a stored tensor as `dtype` on the CPU, read-only, complete once the futures are done.

        It is mapped if the file has this dtype. Raises, at once or from each future: IntegrityError if the file is too
        short; OSError.
        """
        if stored.dtype != dtype:
            out = torch.empty(stored.shape, dtype=dtype)
            return out, self.tensor(stored, out)
        self.bytes += stored.nbytes
        mapped = map_tensor(stored)
        raw = mapped.view(-1).view(torch.uint8)
        starts = range(0, len(raw), _PIECE_BYTES)
        return mapped, [self._threads.submit(self._touch, stored, raw, start) for start in starts]

    def tensor(self, stored: Stored, out: Tensor) -> list[Future[None]]:
        """Begin to fill `out`, contiguous on the CPU, converted to its dtype.

        Raises, from each future: IntegrityError if the file is too short; OSError.
        """
        self.bytes += stored.nbytes
        flat, size = out.view(-1), stored.dtype.itemsize
        step = _PIECE_BYTES // size
        return [
            self._threads.submit(self._fill, stored, [(stored.offset + start * size, flat[start : start + step])])
            for start in range(0, flat.numel(), step)
        ]

    def rows(self, stored: Stored, rows_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Read some rows [N, D] of a stored table [V, D] now."""
        out_ND = torch.empty(len(rows_N), stored.shape[1], dtype=dtype)
        row_bytes = stored.shape[1] * stored.dtype.itemsize
        self.bytes += len(rows_N) * row_bytes
        places = [(stored.offset + row * row_bytes, out_D) for row, out_D in zip(rows_N.tolist(), out_ND, strict=True)]
        pending = [
            self._threads.submit(self._fill, stored, places[start : start + _ROWS])
            for start in range(0, len(places), _ROWS)
        ]
        for future in pending:
            future.result()
        return out_ND

    def _fill(self, stored: Stored, places: list[tuple[int, Tensor]]) -> None:
        with stored.file.open("rb", buffering=0) as stream:
            for offset, out in places:
                raw = out if out.dtype == stored.dtype else torch.empty(out.shape, dtype=stored.dtype)
                read_exactly(stream, offset, raw.view(torch.uint8).numpy().data, stored.file)
                if raw is not out:
                    out.copy_(raw)

    def _touch(self, stored: Stored, raw: Tensor, start: int) -> None:
        """Bring the pages of one piece of a mapped tensor into memory."""
        piece = raw[start : start + _PIECE_BYTES]
        # Touching a page beyond the end of the file kills the process, without an exception.
        check_reaches(stored.file, stored.offset + start + len(piece))
        piece[::_PAGE_BYTES].sum()


class MappedLayer:
    """A layer mapped from the system's page cache: without a copy on a CPU, else copied when it is taken."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._tensors: dict[str, Tensor] = {}
        self._pending: list[Future[None]] = []

    def begin(self, tensors: Mapping[str, Stored], reads: Reads) -> None:
        """Begin to read a layer. The layer before it must be released."""
        weights = {name: reads.weight(stored, self._dtype) for name, stored in tensors.items()}
        self._tensors = {name: tensor for name, (tensor, _) in weights.items()}
        self._pending = [piece for _, pieces in weights.values() for piece in pieces]

    def take(self) -> dict[str, Tensor]:
        """Wait for the layer's tensors on the device, valid until `release`. Raises: errors of its reads."""
        for piece in self._pending:
            piece.result()
        return {name: tensor.to(self._device) for name, tensor in self._tensors.items()}

    def release(self) -> None:
        """Free the layer, once all its computation is queued and nothing refers to its tensors."""
        self._tensors, self._pending = {}, []


class PinnedLayer:
    """Pinned memory of a layer, and its copy on the GPU, made on a separate stream. Methods as of MappedLayer."""

    def __init__(self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device):
        room = [-(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape in shapes.values()]
        self._memory = torch.empty(sum(room), dtype=torch.uint8, pin_memory=True)
        self._on_gpu = torch.empty_like(self._memory, device=device)
        self._tensors, self._gpu_tensors = (
            {
                name: part[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
                for part, (name, shape) in zip(memory.split(room), shapes.items(), strict=True)
            }
            for memory in (self._memory, self._on_gpu)
        )
        self._pending: list[Future[None]] = []
        self._runtime = runtime(device)
        self._stream = self._runtime.Stream(device)
        self._copied, self._computed = self._runtime.Event(), self._runtime.Event()
        self._computed.record(self._runtime.current_stream(device))

    def begin(self, tensors: Mapping[str, Stored], reads: Reads) -> None:
        # The previous layer's copy still reads the pinned memory.
        self._copied.synchronize()
        self._pending = [
            piece for name, stored in tensors.items() for piece in reads.tensor(stored, self._tensors[name])
        ]

    def take(self) -> dict[str, Tensor]:
        for piece in self._pending:
            piece.result()
        with self._runtime.stream(self._stream):
            self._stream.wait_event(self._computed)
            self._on_gpu.copy_(self._memory, non_blocking=True)
            self._copied.record(self._stream)
        self._runtime.current_stream(self._on_gpu.device).wait_event(self._copied)
        return self._gpu_tensors

    def release(self) -> None:
        self._pending = []
        self._computed.record(self._runtime.current_stream(self._on_gpu.device))


def layer_buffers(
    shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> list[MappedLayer] | list[PinnedLayer]:
    """Return room for two layers of a model: one computes while the next is read.

    Args:
        shapes: of one layer's tensors by name, the same for every layer.
    """
    if kind_of(device.type).pinned_copies:
        return [PinnedLayer(shapes, dtype, device) for _ in range(2)]
    return [MappedLayer(dtype, device) for _ in range(2)]
