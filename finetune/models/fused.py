"""The fast path: decoder layers that compute what PEFT's and transformers' do with the package's own kernels.

A layer is swapped for one of a subclass that has the same children under the same names, so the model stays an
ordinary PeftModel: saving, loading, merging, disabling the adapter and generating go on as before. The kernels run when
a packed batch comes with its segments, and on a CPU when tokens are read without gradients, as in generating; any other
call takes the inherited way. A projection that the kernels don't know (DoRA, int8, several active adapters, modules
trained in full) is called as it is, the rest stays fast.

Shapes: B rows of L tokens each, 1 row when packed; T = B * L; D hidden width, H heads, W head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
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

# Of queries, keys and values: [T, H, W] each, with fewer heads in the latter two.
Heads = tuple[Tensor, Tensor, Tensor]


class FusedDecoderLayer(Qwen2DecoderLayer):
    """A Qwen2 decoder layer by the kernels of the package, where they know the call."""

    @classmethod
    def from_module(cls, layer: Qwen2DecoderLayer) -> FusedDecoderLayer:
        """Shares everything with the layer it takes the place of: parameters, children, hooks, flags."""
        fast = cls.__new__(cls)
        fast.__dict__ = layer.__dict__
        return fast

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
        known = segments is not None or _reads(hidden_states)
        if not known or position_embeddings is None or attention.config.attention_dropout:
            kwargs |= {"position_embeddings": position_embeddings, "past_key_values": past_key_values}
            kwargs |= {} if segments is None else {"segments": segments}
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        x_TD, rows = hidden_states.flatten(0, 1), len(hidden_states)
        heads = _heads(attention, _norm(self.input_layernorm, x_TD), position_embeddings, rows)
        if segments is None:
            mixed_THW = _attend_cached(attention, heads, rows, attention_mask, past_key_values, kwargs)
        else:
            mixed_THW = attend(*heads, segments, attention.scaling)
        x_TD = x_TD + _apply(mixed_THW.flatten(1), attention.o_proj)[0]
        x_TD = x_TD + _mlp(self.mlp, _norm(self.post_attention_layernorm, x_TD))
        return x_TD.view_as(hidden_states)


def fuse_layers(model: nn.Module) -> None:
    """Swaps every decoder layer of a model, in place; doing it again changes nothing."""
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for i, layer in enumerate(module):
                if type(layer) is Qwen2DecoderLayer:
                    module[i] = FusedDecoderLayer.from_module(layer)


def _reads(hidden_states: Tensor) -> bool:
    """Whether tokens are read without gradients on a CPU; a GPU has bitsandbytes' own kernels for a few of them."""
    return hidden_states.device.type == "cpu" and not torch.is_grad_enabled()


def _heads(module: Qwen2Attention, x_TD: Tensor, angles: tuple[Tensor, Tensor], rows: int) -> Heads:
    """Queries and keys, rotated, and values."""
    query, key, value = (
        y.unflatten(-1, (-1, module.head_dim)) for y in _apply(x_TD, module.q_proj, module.k_proj, module.v_proj)
    )
    cos_TW, sin_TW = (angle.expand(rows, -1, -1).flatten(0, 1) for angle in angles)
    return apply_rope(query, cos_TW, sin_TW), apply_rope(key, cos_TW, sin_TW), value


def _attend_cached(
    module: Qwen2Attention, heads: Heads, rows: int, mask: Tensor | None, cache: Cache | None, kwargs: dict[str, Any]
) -> Tensor:
    """What transformers' own attention makes of these and of the keys and values before them, [T, H, W]."""
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
    """What the layers make of one input: by the kernel, or each by itself where one of them is unknown to it."""
    projections = [read_projection(layer, x_TD.dtype) for layer in layers]
    if all(projections):
        return project(x_TD, projections)  # type: ignore[arg-type]
    return tuple(layer(x_TD) for layer in layers)


def _norm(module: Qwen2RMSNorm, x_TD: Tensor) -> Tensor:
    if type(module) is not Qwen2RMSNorm or module.weight.requires_grad:  # trained, it is wrapped by PEFT
        return module(x_TD)
    return rms_norm(x_TD, module.weight, module.variance_epsilon)


def read_projection(layer: nn.Module, dtype: torch.dtype) -> Projection | None:
    """A linear layer with its adapter as the kernels want it, as it stands now; None for one that they don't know."""
    base, adapter = layer, None
    if isinstance(layer, LoraLayer):
        base = layer.get_base_layer()
        if layer.merged:
            return None
        if not layer.disable_adapters:
            active = [name for name in layer.active_adapters if name in layer.lora_A]
            if len(active) > 1 or any(name in layer.lora_variant for name in active):
                return None
            adapter = _read_adapter(layer, active[0]) if active else None
    return _read_frozen(base, adapter, dtype)


def _read_adapter(layer: LoraLayer, name: str) -> Adapter:
    dropout, factors = layer.lora_dropout[name], (layer.lora_A[name], layer.lora_B[name])
    probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    a, b = (cast(nn.Linear, factor).weight for factor in factors)
    return Adapter(a, b, layer.scaling[name], probability)


def _read_frozen(layer: Any, adapter: Adapter | None, dtype: torch.dtype) -> Projection | None:
    if any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
        return None
    if type(layer) is nn.Linear:
        return Projection(layer.weight, layer.bias, None, adapter) if layer.weight.dtype == dtype else None
    if type(layer).__name__ == "Linear4bit":
        state = layer.weight.quant_state
        if state is None or state.dtype != dtype or layer.compute_dtype != dtype:
            return None
        resident = getattr(layer, "resident_weight", None)
        if resident is not None:
            return Projection(resident, layer.bias, None, adapter)
        return Projection(layer.weight.data, layer.bias, state, adapter)
    return None
