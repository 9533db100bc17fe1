"""Gradient checkpointing per decoder layer: drop its activations after forward and recompute them in backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.ops.limits import MLP_TILE_ROWS
from finetune.system.errors import ConfigError

# `train.gradient_checkpointing` with auto already resolved: none, all, offload or a number of layers.
CheckpointSetting = str | int


def checkpointed_layers(setting: CheckpointSetting, layers: int, first: int = 0) -> range:
    """Return the indices of the layers to checkpoint.

    A number N selects the first N layers that backward reaches. The last layers keep their activations, which backward
    frees before it recomputes the first layer. The last layer is checkpointed only if N includes every layer: backward
    starts with it, so its activations would be recomputed at once.

    first: index of the lowest layer that backward reaches.

    Raises:
        ConfigError: the setting exceeds the number of layers.
    """
    reached = max(0, layers - first)
    if isinstance(setting, int):
        if setting > layers:
            raise ConfigError(f"train.gradient_checkpointing: the model has only {layers} layers, found {setting}")
        return range(first, first + min(setting, reached))
    return range(first, first + max(0, reached - 1)) if setting in ("all", "offload") else range(0)


def apply_gradient_checkpointing(model: nn.Module, setting: CheckpointSetting) -> range:
    """Switch gradient checkpointing on or off in every decoder layer; return the indices of the layers that use it.

    This sets the switch of each transformers layer. The model-wide switch would also make the embeddings require a
    gradient, and layers below the first adapter would then build a graph for nothing. The RNG state is restored before
    a layer is recomputed, so dropout draws the same mask. Recomputation stops at the last tensor that backward needs:
    a frozen down_proj saves none and is not recomputed.
    """
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)}
    # The lowest layer that backward reaches. Every trained parameter outside the layers and the head counts as an
    # embedding, before all layers.
    first = len(found)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lm_head" not in name.split("."):
            above = (number for number, layer in enumerate(found) if name.startswith(f"{layer}."))
            first = min(first, next(above, 0))
    chosen = checkpointed_layers(setting, len(found), first)
    offloads = setting == "offload" and _on_gpu(model)
    run = partial(_offloaded, HostOffload()) if offloads else partial(checkpoint, use_reentrant=False)
    # Backward starts with the last layer, whose kept gate and up would be the largest tensors of a checkpointed model.
    tiled = range(chosen.start, len(found)) if setting in ("all", "offload") else chosen
    tiled = tiled if _on_gpu(model) else range(0)  # a CPU runs every MLP in blocks
    rows = MLP_TILE_ROWS["offload" if setting == "offload" else "all"]
    for number, layer in enumerate(found.values()):
        layer.gradient_checkpointing = number in chosen
        setattr(layer, "mlp_tile_rows", rows if number in tiled else None)  # noqa: B010 - read by fused layers
        setattr(layer, "_gradient_checkpointing_func", run)  # noqa: B010 - set so, it needs no declared type
    return chosen


def _offloaded(offload: HostOffload, function, *inputs: Tensor):
    """Offload the layer's inputs, the only tensors that checkpoint itself saves."""
    with offload.hooks():
        return checkpoint(function, *inputs, use_reentrant=False)


def _on_gpu(model: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in model.parameters())


@dataclass(eq=False)
class _Waiting:
    """A tensor in main memory, its copy on the device while it is fetched, and the tensor stored before it."""

    host: Tensor
    device: torch.device
    before: Callable[[], _Waiting | None]
    fetched: Tensor | None = None
    arrived: torch.Event | None = None


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
        waiting = _Waiting(host, tensor.device, self._last)
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
