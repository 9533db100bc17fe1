"""One pass of the decoder over tokens of many answers, with several adapters and without padding in linear layers.

Rows are sorted by adapter. The frozen product is one for all rows; each adapter adds its own on a slice of them.

Shapes: T tokens of a pass, D hidden width, H query heads, K key heads, W head width, V vocabulary; in attention P parts
of a group, C queries and L keys of each with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from finetune.losses.chunked import logits_of
from finetune.losses.cross_entropy import head_of, vocabulary_rows
from finetune.models.decoder import decoder_of, family_in, text_config
from finetune.models.families.known import attention_window
from finetune.models.fused import read_projection
from finetune.ops.elementwise import apply_rope_forward, rms_norm_forward, swiglu_forward
from finetune.ops.lora import add_adapters_
from finetune.ops.matmul import matmul, uses_fp32_matmul
from finetune.ops.packed import PackedLinear, can_pack, pack
from finetune.serving.engine.adapters import INPUTS
from finetune.serving.engine.blocks import BLOCK_TOKENS
from finetune.serving.engine.rows import Group, Part, Rows, plan_rows
from finetune.system.accelerator import on_gpu, table_key
from finetune.system.errors import ConfigError

# Keys and values that attention gathers at once: on a CPU they stay in the cache of a core.
_GATHERED_BYTES = {"cpu": 2**20, "gpu": 2**29}
# Positions whose angles depend on the longest row of a batch.
_CHANGING_ROPES = ("dynamic", "longrope")


class RaggedDecoder:
    """The decoder of a loaded base, and the keys and values of all blocks.

    packed: bring weights into the layout of a CPU's products where there is one. They leave the base, which then is no
    model any more.
    """

    def __init__(self, base: PreTrainedModel, blocks: int, *, packed: bool = False):
        _check_supported(base)
        self.base, self.device, self.dtype = base, base.device, base.dtype
        decoder, config = decoder_of(base), text_config(base)
        self._embed, self._norm, self._rotary = decoder.embed_tokens, decoder.norm, decoder.rotary_emb
        self._layers = list(decoder.layers)
        self._head, self.vocabulary = head_of(base), vocabulary_rows(base)
        first = self._layers[0].self_attn
        self._width, self._scale, self._norm_heads = first.head_dim, first.scaling, hasattr(first, "q_norm")
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        family = family_in(base)
        self._linears = [
            [
                [_read_linear(base.get_submodule(family.linear_path(i, name)), self.dtype, packed) for name in names]
                for names in INPUTS
            ]
            for i in range(len(self._layers))
        ]
        self._fp32_attention = uses_fp32_matmul(self.device, self.dtype)
        shape = (len(self._layers), blocks, BLOCK_TOKENS, 2, self._key_heads, self._width)
        self._cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        block_bytes = self._cache[0, :1].nbytes
        self._gathered_blocks = max(1, _GATHERED_BYTES[table_key(self.device)] // block_bytes)
        self._gathered = self._cache.new_empty(0)
        self._angles: tuple[Tensor, Tensor] = (self._gathered, self._gathered)

    def close(self) -> None:
        """Free the keys and values."""
        self._cache = self._gathered = self._cache.new_empty(0)

    def clear(self, blocks: Sequence[int]) -> None:
        """Forget what blocks hold: NaN behind the end of an answer would spread, although its weight is 0."""
        self._cache.index_fill_(1, torch.tensor(blocks, device=self.device), 0)

    def run(self, parts: Sequence[Part]) -> tuple[Tensor, list[int]]:
        """Compute tokens, and keep their keys and values.

        Args:
            parts: those of one adapter side by side.

        Returns:
            Hidden states [T, D] after the last layer, and the first row of each part.
        """
        rows = plan_rows(parts, self._gathered_blocks, self.device, self.dtype)
        x_TD = self._embed(rows.ids)
        angles = self._rotate(rows)
        for number, layer in enumerate(self._layers):
            x_TD = x_TD + self._attention(number, x_TD, rows, angles)
            normed_TD = _norm(layer.post_attention_layernorm, x_TD)
            gate_TI, up_TI = self._project(number, 2, normed_TD, rows)
            x_TD += self._project(number, 3, swiglu_forward(gate_TI, up_TI), rows)[0]
        return x_TD, rows.firsts

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the logits [N, V] of hidden states after the last layer."""
        return logits_of(_norm(self._norm, x_ND), self._head, self.vocabulary)

    def _project(self, number: int, group: int, x_TD: Tensor, rows: Rows) -> list[Tensor]:
        """Apply the linear layers of one input, with the adapters of their rows."""
        outputs = [linear(x_TD) for linear in self._linears[number][group]]
        for some, adapter in rows.adapters:
            if stacks := adapter.stacks[number][group]:
                add_adapters_([output[some] for output in outputs], x_TD[some], stacks)
        return outputs

    def _attention(self, number: int, x_TD: Tensor, rows: Rows, angles: tuple[Tensor, Tensor]) -> Tensor:
        layer = self._layers[number]
        heads = self._project(number, 0, _norm(layer.input_layernorm, x_TD), rows)
        query, key, value = (y.view(len(y), -1, self._width) for y in heads)
        if self._norm_heads:
            query, key = _norm(layer.self_attn.q_norm, query), _norm(layer.self_attn.k_norm, key)
        turned = apply_rope_forward(torch.cat((query, key), 1), *angles)
        query, key = turned.split((self._heads, self._key_heads), 1)
        cache = self._cache[number]
        cache.flatten(0, 1).index_copy_(0, rows.slots, torch.stack((key, value), 1))
        if rows.source is not None:
            query = query.index_select(0, rows.source)
        parts = query.split([group.parts * group.queries for group in rows.groups])
        outputs = [self._attend(part, cache, group) for part, group in zip(parts, rows.groups, strict=True)]
        mixed = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        if rows.place is not None:
            mixed = mixed.index_select(0, rows.place)
        return self._project(number, 1, mixed, rows)[0]

    def _attend(self, query_QHW: Tensor, cache: Tensor, group: Group) -> Tensor:
        """Return the attention [P * C, H * W] of a group."""
        key, value = self._gather(cache, group)
        if group.queries == 1:  # the query heads of a key head are its queries
            query = query_QHW.reshape(group.parts, self._key_heads, -1, self._width)
        else:
            query = query_QHW.reshape(group.parts, group.queries, self._heads, self._width).transpose(1, 2)
            if on_gpu(query):  # torch's kernel with a mask has no grouped heads
                key, value = (x.repeat_interleave(self._heads // self._key_heads, 1) for x in (key, value))
        mask = group.mask
        if self._fp32_attention:
            query, key, value, mask = (x.float() for x in (query, key, value, mask))
        grouped = query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(query, key, value, mask, scale=self._scale, enable_gqa=grouped)
        output = output if group.queries == 1 else output.transpose(1, 2)
        return output.reshape(len(query_QHW), -1).to(self.dtype)

    def _gather(self, cache: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """Return the keys and values [P, K, L, W] of a group, in a buffer that the next call overwrites.

        Fresh memory for each call would take several times as long as the copy.
        """
        shape = (len(group.table), *cache.shape[1:])
        if self._gathered.numel() < (values := len(group.table) * cache[0].numel()):
            self._gathered = cache.new_empty(values)
        gathered = self._gathered[:values].view(shape)
        torch.index_select(cache, 0, group.table, out=gathered)
        pairs = gathered.view(group.parts, -1, 2, self._key_heads, self._width)
        return pairs[:, :, 0].transpose(1, 2), pairs[:, :, 1].transpose(1, 2)

    def _rotate(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [T, W] of positions, from a table that grows."""
        if len(self._angles[0]) <= rows.longest:
            every = torch.arange(1 << rows.longest.bit_length(), device=self.device)[None]
            cos, sin = self._rotary(self._cache, every)
            self._angles = cos[0], sin[0]
        cos, sin = (angle.index_select(0, rows.positions) for angle in self._angles)
        return cos, sin


def _norm(module: Any, x_TD: Tensor) -> Tensor:
    return rms_norm_forward(x_TD, module.weight, module.variance_epsilon)


def _read_linear(module: Any, dtype: torch.dtype, packed: bool) -> Callable[[Tensor], Tensor]:
    """Return a linear layer as a function: of the kernels, or the module itself where they do not know its kind.

    packed: see `RaggedDecoder`.
    """
    projection = read_projection(module, dtype)
    if isinstance(projection, str):
        return module
    weight, bias = projection.weight, projection.bias
    if projection.quant_state is not None:
        return lambda x_TD: matmul(x_TD, projection.dequantized(dtype).T, bias)
    if packed and can_pack(weight):
        linear = PackedLinear(pack(weight), bias)
        if vars(module).pop("resident_weight", None) is None:
            module.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        return linear
    return lambda x_TD: matmul(x_TD, weight.T, bias)


def context_limit(base: PreTrainedModel) -> int:
    """Return the longest answer with its prompt: within the window of attention, all tokens see each other."""
    config = text_config(base)
    window = attention_window(config.to_dict())
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _check_supported(base: PreTrainedModel) -> None:
    """Raise ConfigError if the arithmetic of a base differs from that of this file."""
    config, problems = text_config(base), []
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in _CHANGING_ROPES:
        problems.append(f"rope_type={rope}: the positions of an answer would depend on the others in its batch")
    if not all(isinstance(layer.mlp.act_fn, SiLUActivation) for layer in decoder_of(base).layers):
        problems.append(f"hidden_act={config.hidden_act}: the MLP must be SwiGLU")
    if problems:
        help_line = "help: serve it with engine=vllm"
        raise ConfigError("\n".join(["model.name: not supported by engine=embedded:", *problems, help_line]))
