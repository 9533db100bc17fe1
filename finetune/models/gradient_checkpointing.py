"""Gradient checkpointing per decoder layer: drop its activations after forward and recompute them in backward."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.models.fused import decoder_layers
from finetune.models.offload import HostOffload
from finetune.ops.limits import LOGITS_VALUES, MLP_TILE_ROWS
from finetune.system.accelerator import on_gpu
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
    found = dict(decoder_layers(model))
    # The lowest layer that backward reaches. Every trained parameter outside the layers and the head counts as an
    # embedding, before all layers.
    first = len(found)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lm_head" not in name.split("."):
            above = (number for number, layer in enumerate(found) if name.startswith(f"{layer}."))
            first = min(first, next(above, 0))
    chosen = checkpointed_layers(setting, len(found), first)
    offloads = setting == "offload" and _on_gpu(model)
    run = partial(_offloaded, HostOffload(len(chosen))) if offloads else partial(checkpoint, use_reentrant=False)
    saves_memory = setting in ("all", "offload") and _on_gpu(model)
    # Backward starts with the last layer, whose kept gate and up would be the largest tensors of a checkpointed model.
    tiled = range(chosen.start, len(found)) if saves_memory else chosen
    tiled = tiled if _on_gpu(model) else range(0)  # a CPU runs every MLP in blocks
    rows = MLP_TILE_ROWS["offload" if setting == "offload" else "all"]
    language_model: Any = model
    if (head := language_model.get_output_embeddings()) is not None:
        # losses/chunked.py reads it in training and evaluation.
        head.logits_values = LOGITS_VALUES[str(setting)] if saves_memory else None
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
    return any(on_gpu(parameter) for parameter in model.parameters())
