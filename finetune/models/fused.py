"""Fused decoder layers: the same results as PEFT and transformers, computed by the kernels in ops/.

A layer is replaced by an instance of a subclass with the same children under the same names, so the model stays an
ordinary PeftModel: saving, loading, merging, disabling the adapter and generating work as before. Attention is that of
ops/ for packed batches with segments, and that of transformers for every other batch. On a GPU, a model in eval mode
without gradients runs the inherited forward: bitsandbytes has its own kernels for a few tokens.
A projection that the kernels do not know (DoRA, int8, several active adapters, trained weights) runs as its own module.

Shapes: B rows of L tokens each, 1 row when packed; T = B * L; D hidden width, H heads, W head width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.activations import SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from finetune.models.families import FAMILIES
from finetune.models.quant.quantize import keep_weights_trainable_after_eval
from finetune.ops.attention import Segments, attend
from finetune.ops.elementwise import apply_rope, rms_norm
from finetune.ops.linear import Projection, project, swiglu_mlp
from finetune.ops.lora import Adapter

# Queries, keys and values: [T, H, W] each. Keys and values have fewer heads.
Heads = tuple[Tensor, Tensor, Tensor]
# Classes of transformers by module and name, so that only those of the model in use are imported. The layers of all
# families differ in biases, head norms and positions alone, which the modules of a layer show.
_LAYERS = {(family.modeling, family.layer) for family in FAMILIES.values()}
_MODELING = {family.modeling for family in FAMILIES.values()}
_NORMS = {(family.modeling, family.norm) for family in FAMILIES.values()}


class FusedDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer that computes with the kernels in ops/ where they support the call.

    `_fused` makes the class of a family, which inherits from its layer in transformers.

    mlp_tile_rows: see `swiglu_mlp`; gradient checkpointing sets it.
    """

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    mlp_tile_rows: int | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> Tensor:
        attention = self.self_attn
        generating = not (self.training or torch.is_grad_enabled() or hidden_states.device.type == "cpu")
        wants_weights = kwargs.get("output_attentions") or attention.config.output_attentions
        inherited = (generating or wants_weights) and segments is None
        if inherited or position_embeddings is None or attention.config.attention_dropout:
            kwargs |= {"position_embeddings": position_embeddings, "past_key_values": past_key_values}
            kwargs |= {} if segments is None else {"segments": segments}
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        x_TD, rows = hidden_states.flatten(0, 1), len(hidden_states)
        heads = _heads(attention, apply_norm(self.input_layernorm, x_TD), position_embeddings, rows)
        if segments is None:
            mixed_THW = _attend_cached(attention, heads, rows, attention_mask, cache=past_key_values, **kwargs)
        else:
            mixed_THW = attend(*heads, segments, attention.scaling)
        x_TD = x_TD + _apply(mixed_THW.flatten(1), attention.o_proj)[0]
        del heads, mixed_THW  # the MLP needs their memory
        mlp_TD = _mlp(self.mlp, apply_norm(self.post_attention_layernorm, x_TD), self.mlp_tile_rows)
        # No view: an operation in place on one would lose the hook with which FSDP gathers a layer for backward.
        return x_TD.view_as(hidden_states) + mlp_TD.view_as(hidden_states)


@cache
def _fused(layer: type[nn.Module]) -> type[FusedDecoderLayer]:
    """Return the fused class of a family's layer."""
    return type(f"Fused{layer.__name__}", (FusedDecoderLayer, layer), {"__doc__": FusedDecoderLayer.__doc__})


def _is_one_of(module: nn.Module, known: set[tuple[str, str]]) -> bool:
    return (type(module).__module__, type(module).__qualname__) in known


@dataclass(frozen=True, slots=True)
class FusedLayers:
    """The decoder layers of a model after `fuse_layers`.

    fused, layers: number of fused decoder layers, and of all. unfused: name of each module that runs as PEFT or
    transformers made it -> the reason.
    """

    fused: int
    layers: int
    unfused: dict[str, str]

    def __str__(self) -> str:
        reasons = Counter(self.unfused.values())
        parts = [f"fused layers={self.fused} of {self.layers}"]
        return "; ".join([*parts, *(f"unfused modules={count} ({why})" for why, count in reasons.items())])


def fuse_layers(model: nn.Module) -> FusedLayers:
    """Replace the decoder layers of a supported family by fused ones, in place. A second call changes nothing.

    The model may be a base or a PeftModel, in 4-bit (bitsandbytes) or 16 and 32-bit weights. It trains in any trainer,
    with the losses and gradients of PEFT; gradient checkpointing, autocast, DDP, saving, merging and `generate` work as
    before. A base may get its adapter afterwards, for example from `peft_config` of TRL's SFTTrainer.

    Args:
        model: a transformers model, or a PEFT model around one.

    Returns:
        The number of fused layers, and every module that the kernels do not support now, with the reason. A layer
        reads its modules at each call, so a later adapter or a frozen weight counts too.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        keep_weights_trainable_after_eval(model)
    unfused: dict[str, str] = {}
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for i, layer in enumerate(module):
                if _is_one_of(layer, _LAYERS) and not _replaced_forward(layer):
                    # It shares parameters, children, hooks and flags with the replaced layer.
                    kind = _fused(type(layer))
                    module[i] = kind.__new__(kind)
                    module[i].__dict__ = layer.__dict__
    layers = dict(decoder_layers(model))
    for name, layer in layers.items():
        unfused |= {f"{name}.{part}".removesuffix("."): reason for part, reason in _unsupported(layer)}
    return FusedLayers(sum(isinstance(layer, FusedDecoderLayer) for layer in layers.values()), len(layers), unfused)


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the decoder layers of a model with their full names, fused or not; the layers of towers are none."""
    for name, layer in model.named_modules():
        of_tower = type(layer).__module__ in _MODELING and not _is_one_of(layer, _LAYERS)
        if isinstance(layer, GradientCheckpointingLayer) and not of_tower:
            yield name, layer


def _replaced_forward(layer: nn.Module) -> bool:
    """Return whether another library replaced the forward of a module, as accelerate does to move offloaded weights."""
    return any("forward" in vars(module) for module in layer.modules())


def _unsupported(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the name of each module in a layer that runs as its own module, and the reason; "" is the layer itself."""
    if not isinstance(layer, FusedDecoderLayer):
        replaced = _is_one_of(layer, _LAYERS)
        yield "", "another library replaced its forward" if replaced else f"no kernels for {type(layer).__name__}"
        return
    if layer.self_attn.config.attention_dropout:
        yield "", "attention_dropout"
        return
    dtype = layer.input_layernorm.weight.dtype  # of the hidden states
    for parent, names in (
        ("self_attn", ("q_proj", "k_proj", "v_proj")),
        ("self_attn", ("o_proj",)),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
    ):
        found = {name: read_projection(getattr(getattr(layer, parent), name), dtype) for name in names}
        # One unsupported module leaves those of the same input or MLP with it.
        if reason := next((f"{name}: {why}" for name, why in found.items() if isinstance(why, str)), None):
            yield from ((f"{parent}.{name}", why if isinstance(why, str) else reason) for name, why in found.items())


def _heads(module: Any, x_TD: Tensor, angles: tuple[Tensor, Tensor], rows: int) -> Heads:
    """Return queries and keys with position embeddings, and values."""
    query, key, value = (
        y.unflatten(-1, (-1, module.head_dim)) for y in _apply(x_TD, module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query, key = apply_norm(module.q_norm, query), apply_norm(module.k_norm, key)
    cos_TW, sin_TW = (angle.expand(rows, -1, -1).flatten(0, 1) for angle in angles)
    return apply_rope(query, cos_TW, sin_TW), apply_rope(key, cos_TW, sin_TW), value


def _attend_cached(
    module: Any, heads: Heads, rows: int, mask: Tensor | None, *, cache: Cache | None, **kwargs: Any
) -> Tensor:
    """Run the attention of transformers on these heads and the cached keys and values; returns [T, H, W]."""
    query, key, value = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in heads)
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    name = module.config._attn_implementation or "eager"
    kernel = AttentionInterface().get_interface(name, eager_attention_forward)
    mixed_BLHW, _ = kernel(
        module,
        query,
        key,
        value,
        mask,
        scaling=module.scaling,
        sliding_window=getattr(module, "sliding_window", None),
        **kwargs,
    )
    return mixed_BLHW.flatten(0, 1)


def _mlp(module: Any, x_TD: Tensor, tile_rows: int | None) -> Tensor:
    dtype = _product_dtype(x_TD)
    projections = _projections((module.gate_proj, module.up_proj, module.down_proj), dtype)
    if projections and isinstance(module.act_fn, SiLUActivation):
        with torch.autocast(x_TD.device.type, enabled=False):
            return swiglu_mlp(x_TD.to(dtype), *projections, tile_rows=tile_rows)
    return module(x_TD)


def _apply(x_TD: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Apply several linear layers to one input: by the kernel if it knows all of them, else each module alone."""
    dtype = _product_dtype(x_TD)
    if projections := _projections(layers, dtype):
        with torch.autocast(x_TD.device.type, enabled=False):
            return project(x_TD.to(dtype), projections)
    return tuple(layer(x_TD) for layer in layers)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: that of autocast, or of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _projections(layers: Sequence[nn.Module], dtype: torch.dtype) -> list[Projection] | None:
    """Return linear layers as the kernels take them; None if one is not supported."""
    found = [read_projection(layer, dtype) for layer in layers]
    supported = [projection for projection in found if isinstance(projection, Projection)]
    return supported if len(supported) == len(found) else None


def apply_norm(module: Any, x_TD: Tensor) -> Tensor:
    """Apply RMSNorm over the last dimension by the kernel, or any other module as it is."""
    if not _is_one_of(module, _NORMS) or module.weight.requires_grad:  # PEFT wraps a trained norm
        return module(x_TD)
    return rms_norm(x_TD, module.weight, module.variance_epsilon)


def read_projection(layer: Any, dtype: torch.dtype) -> Projection | str:
    """Return a linear layer and its active adapter as the kernels take them, or the reason why they do not.

    dtype: of the products.
    """
    base, adapter = layer, None
    if isinstance(layer, LoraLayer):
        base = layer.get_base_layer()
        if layer.merged:
            return "merged adapter"
        if not layer.disable_adapters:
            active = [name for name in layer.active_adapters if name in layer.lora_A]
            if len(active) > 1:
                return "several active adapters"
            for name in active:
                if name in layer.lora_variant:
                    return "DoRA" if layer.use_dora.get(name) else type(layer.lora_variant[name]).__name__
                dropout = layer.lora_dropout[name]
                probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
                a, b = (cast(nn.Linear, factors[name]).weight for factors in (layer.lora_A, layer.lora_B))
                adapter = Adapter(a, b, layer.scaling[name], probability)
    # Dictionaries in place of `parameters()` and getattr: every layer reads seven projections in every pass.
    if any(parameter is not None and parameter.requires_grad for parameter in base._parameters.values()):
        return "trained weights"
    weight = base.weight
    kind = weight.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # a streamed layer has no device between its passes
    if type(base) is nn.Linear:
        if weight.dtype != dtype and not autocast:
            return f"weights in {weight.dtype}, hidden states in {dtype}; fused under autocast"
        return Projection(weight, base.bias, None, adapter)
    if type(base).__name__ == "Linear4bit":
        state = weight.quant_state
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return "4-bit weights in another layout"
        if base.compute_dtype != dtype and not autocast:
            return f"products in {base.compute_dtype}, hidden states in {dtype}; fused under autocast"
        if (resident := vars(base).get("resident_weight")) is not None:
            return Projection(resident, base.bias, None, adapter)
        return Projection(weight.data, base.bias, state, adapter)
    return f"no kernels for {type(base).__name__}"
