"""Which decoder layers drop their activations after forward and compute them again in backward."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.ops.offload import HostOffload
from finetune.system.errors import ConfigError

Recompute = (
    str | int
)  # `train.gradient_checkpointing`, with auto already decided: none, all, offload or a number of layers


def checkpointed_layers(setting: Recompute, layers: int, first: int = 0) -> range:
    """Numbers of the layers to recompute, of a model with so many; backward reaches no layer below `first`.

    A number N means the first N that backward reaches: the last layers, which backward starts with, keep theirs, so
    what they kept is gone when the first one is made again. The last layer is recomputed only if every one is asked
    for: backward begins with it, so what it would drop would be made again at once.
    Raises: ConfigError if there are fewer layers than asked for.
    """
    reached = max(0, layers - first)
    if isinstance(setting, int):
        if setting > layers:
            raise ConfigError(f"train.gradient_checkpointing asks for {setting} layers, but the model has {layers}")
        return range(first, first + min(setting, reached))
    return range(first, first + max(0, reached - 1)) if setting in ("all", "offload") else range(0)


def apply_gradient_checkpointing(model: nn.Module, setting: Recompute) -> range:
    """Sets, on every decoder layer of the model, whether it is recomputed; returns the numbers of those that are.

    Through transformers' own switch, one layer at a time: its switch for the whole model also makes the embeddings ask
    for a gradient, and then layers below the first adapted one would build a graph for nothing. A layer's generator
    state is restored when it runs again, so dropout draws the same. Its work ends with the last tensor that backward
    needs: a frozen down_proj, which saves none, is not computed again.
    """
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)]
    layers = [layer for _, layer in found]
    chosen = checkpointed_layers(setting, len(layers), _first_reached(model, [name for name, _ in found]))
    run = partial(_offloaded, HostOffload()) if setting == "offload" and _on_gpu(model) else _again
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number in chosen
        setattr(layer, "_gradient_checkpointing_func", run)  # noqa: B010 - set so, it needs no declared type
    return chosen


def _again(function, *inputs: Tensor):
    return checkpoint(function, *inputs, use_reentrant=False)


def _offloaded(offload: HostOffload, function, *inputs: Tensor):
    """The layer's inputs are what checkpoint saves for itself; all that the layer saves goes to checkpoint's hooks."""
    with offload.hooks():
        return _again(function, *inputs)


def _first_reached(model: nn.Module, layer_names: list[str]) -> int:
    """The number of the lowest layer that backward reaches; the number of layers if it reaches none.

    Anything trained outside the layers, but in the head, is taken for an embedding: all layers come after it.
    """
    first = len(layer_names)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lm_head" not in name.split("."):
            above = (number for number, layer in enumerate(layer_names) if name.startswith(f"{layer}."))
            first = min(first, next(above, 0))
    return first


def _on_gpu(model: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in model.parameters())
