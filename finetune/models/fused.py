"""Fused decoder layers: the same results as PEFT and transformers, computed by the kernels in ops/.

A layer is replaced by an instance of a subclass with the same children under the same names, so the model stays an
ordinary PeftModel: saving, loading, merging, disabling the adapter and generating work as before. The kernels run for
packed batches with segments, and on a CPU without gradients (generation). Every other call runs the inherited forward.
A projection that the kernels do not know (DoRA, int8, several active adapters, trained weights) runs as its own module.

Shapes: B rows of L tokens each, 1 row when packed; T = B * L; D hidden width, H heads, W head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2MLP,
    Qwen2RMSNorm,
    eager_attention_forward,
)

from finetune.ops.attention import Segments, attend
from finetune.ops.elementwise import apply_rope, rms_norm
from finetune.ops.linear import Adapter, Projection, project, swiglu_mlp
from finetune.system.errors import ConfigError

# Queries, keys and values: [T, H, W] each. Keys and values have fewer heads.
Heads = tuple[Tensor, Tensor, Tensor]


class FusedDecoderLayer(Qwen2DecoderLayer):
    """A Qwen2 decoder layer that computes with the kernels in ops/ where they support the call."""

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
        # On a GPU, bitsandbytes has its own kernels for a few tokens without gradients.
        generating = hidden_states.device.type == "cpu" and not torch.is_grad_enabled()
        known = segments is not None or generating
        if not known or position_embeddings is None or attention.config.attention_dropout:
            kwargs |= {"position_embeddings": position_embeddings, "past_key_values": past_key_values}
            kwargs |= {} if segments is None else {"segments": segments}
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        x_TD, rows = hidden_states.flatten(0, 1), len(hidden_states)
        heads = _heads(attention, _norm(self.input_layernorm, x_TD), position_embeddings, rows)
        if segments is None:
            mixed_THW = _attend_cached(attention, heads, rows, attention_mask, cache=past_key_values, **kwargs)
        else:
            mixed_THW = attend(*heads, segments, attention.scaling)
        x_TD = x_TD + _apply(mixed_THW.flatten(1), attention.o_proj)[0]
        x_TD = x_TD + _mlp(self.mlp, _norm(self.post_attention_layernorm, x_TD))
        return x_TD.view_as(hidden_states)


def fuse_layers(model: nn.Module) -> tuple[int, int]:
    """Replace the decoder layers of a model by fused ones, in place. A second call changes nothing.

    Returns:
        The number of fused layers and the number of all decoder layers.

    Raises:
        ConfigError: no decoder layer is of a class that has a fused version.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for i, layer in enumerate(module):
                if type(layer) is Qwen2DecoderLayer:
                    # It shares parameters, children, hooks and flags with the replaced layer.
                    module[i] = FusedDecoderLayer.__new__(FusedDecoderLayer)
                    module[i].__dict__ = layer.__dict__
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    fused = sum(isinstance(layer, FusedDecoderLayer) for layer in layers)
    if not fused:
        found = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        raise ConfigError(
            f"train.kernels: fused kernels exist for Qwen2DecoderLayer only, found decoder layers: {found}\n"
            "help: set train.kernels=peft"
        )
    return fused, len(layers)


def _heads(module: Qwen2Attention, x_TD: Tensor, angles: tuple[Tensor, Tensor], rows: int) -> Heads:
    """Return queries and keys with position embeddings, and values."""
    query, key, value = (
        y.unflatten(-1, (-1, module.head_dim)) for y in _apply(x_TD, module.q_proj, module.k_proj, module.v_proj)
    )
    cos_TW, sin_TW = (angle.expand(rows, -1, -1).flatten(0, 1) for angle in angles)
    return apply_rope(query, cos_TW, sin_TW), apply_rope(key, cos_TW, sin_TW), value


def _attend_cached(
    module: Qwen2Attention, heads: Heads, rows: int, mask: Tensor | None, *, cache: Cache | None, **kwargs: Any
) -> Tensor:
    """Run the attention of transformers on these heads and the cached keys and values; returns [T, H, W]."""
    query, key, value = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in heads)
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    name = module.config._attn_implementation or "eager"
    kernel = AttentionInterface().get_interface(name, eager_attention_forward)
    mixed_BLHW, _ = kernel(
        module, query, key, value, mask, scaling=module.scaling, sliding_window=module.sliding_window, **kwargs
    )
    return mixed_BLHW.flatten(0, 1)


def _mlp(module: Qwen2MLP, x_TD: Tensor) -> Tensor:
    layers = (module.gate_proj, module.up_proj, module.down_proj)
    projections = [read_projection(layer, x_TD.dtype) for layer in layers]
    if all(projections) and module.config.hidden_act == "silu":
        gate, up, down = projections
        return swiglu_mlp(x_TD, gate, up, down)  # type: ignore[arg-type]
    return module(x_TD)


def _apply(x_TD: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Apply several linear layers to one input: by the kernel if it knows all of them, else each module alone."""
    projections = [read_projection(layer, x_TD.dtype) for layer in layers]
    if all(projections):
        return project(x_TD, projections)  # type: ignore[arg-type]
    return tuple(layer(x_TD) for layer in layers)


def _norm(module: Qwen2RMSNorm, x_TD: Tensor) -> Tensor:
    if type(module) is not Qwen2RMSNorm or module.weight.requires_grad:  # PEFT wraps a trained norm
        return module(x_TD)
    return rms_norm(x_TD, module.weight, module.variance_epsilon)


def read_projection(layer: Any, dtype: torch.dtype) -> Projection | None:
    """Return a linear layer and its active adapter as the kernels take them; None if they do not support it."""
    base, adapter = layer, None
    if isinstance(layer, LoraLayer):
        base = layer.get_base_layer()
        if layer.merged:
            return None
        if not layer.disable_adapters:
            active = [name for name in layer.active_adapters if name in layer.lora_A]
            if len(active) > 1 or any(name in layer.lora_variant for name in active):
                return None
            for name in active:
                dropout = layer.lora_dropout[name]
                probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
                a, b = (cast(nn.Linear, factors[name]).weight for factors in (layer.lora_A, layer.lora_B))
                adapter = Adapter(a, b, layer.scaling[name], probability)
    if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        return None
    if type(base) is nn.Linear:
        return Projection(base.weight, base.bias, None, adapter) if base.weight.dtype == dtype else None
    if type(base).__name__ == "Linear4bit":
        state = base.weight.quant_state
        if state is None or state.dtype != dtype or base.compute_dtype != dtype:
            return None
        if (resident := getattr(base, "resident_weight", None)) is not None:
            return Projection(resident, base.bias, None, adapter)
        return Projection(base.weight.data, base.bias, state, adapter)
    return None
