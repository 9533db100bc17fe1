"""One pass of the decoder over tokens of many answers, with several adapters and without padding in linear layers.

Rows are sorted by adapter. The frozen product is one for all rows; each adapter adds its own on a slice of them.

Shapes: T tokens of a pass, D hidden width, H query heads, K key heads, W head width, V vocabulary; in attention P parts
of a group, C queries and L keys of each with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.losses.chunked import logits_of
from finetune.losses.cross_entropy import head_of, vocabulary_rows
from finetune.models.decoder import decoder_of, family_in, text_config
from finetune.models.fused import apply_norm, read_projection
from finetune.ops.elementwise import apply_rope_forward, swiglu_forward
from finetune.ops.linear import Projection
from finetune.ops.lora import add_adapters_
from finetune.ops.matmul import matmul, uses_fp32_matmul
from finetune.serving.engine.adapters import INPUTS, LoadedAdapter
from finetune.serving.engine.blocks import BLOCK_TOKENS, blocks_for


class Part(NamedTuple):
    """Consecutive tokens of one answer. ids: of these tokens. start: position of the first. blocks: of the answer."""

    ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    adapter: LoadedAdapter | None


@dataclass(frozen=True, slots=True)
class _Group:
    """Parts that attend together. table: [P * blocks], their blocks. mask: [P, 1, C, L], 0 or -inf."""

    parts: int
    queries: int
    table: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class _Pass:
    """What all layers read. slots: [T], where keys and values of each token go.

    source: the row of each query of the groups, with padding; place: the query of each row; None: the same order.
    adapters: slices of rows with an adapter.
    """

    slots: Tensor
    cos_TW: Tensor
    sin_TW: Tensor
    groups: list[_Group]
    source: Tensor | None
    place: Tensor | None
    adapters: list[tuple[slice, LoadedAdapter]]


class RaggedDecoder:
    """The decoder of a loaded base, and the keys and values of all blocks."""

    def __init__(self, base: PreTrainedModel, blocks: int):
        self.base, self.device, self.dtype = base, base.device, base.dtype
        decoder, config = decoder_of(base), text_config(base)
        self._embed, self._norm, self._rotary = decoder.embed_tokens, decoder.norm, decoder.rotary_emb
        self._layers = list(decoder.layers)
        self._head, self.vocabulary = head_of(base), vocabulary_rows(base)
        first = self._layers[0].self_attn
        self._width, self._scale = first.head_dim, first.scaling
        self._key_heads = config.num_key_value_heads
        self._linears = [[self._read(i, names) for names in INPUTS] for i in range(len(self._layers))]
        self._norm_heads = hasattr(first, "q_norm")
        self._fp32_attention = uses_fp32_matmul(self.device, self.dtype)
        # Zeros: what a block holds behind the end of an answer is multiplied by 0.
        shape = (len(self._layers), blocks, BLOCK_TOKENS, 2, self._key_heads, self._width)
        self._cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._angles: tuple[Tensor, Tensor] | None = None

    def _read(self, number: int, names: Sequence[str]) -> list[Projection | nn.Module]:
        """Return linear layers as the kernels take them, or the module itself where they do not know its kind."""
        family = family_in(self.base)
        modules = [self.base.get_submodule(family.linear_path(number, name)) for name in names]
        found = [read_projection(module, self.dtype) for module in modules]
        return [module if isinstance(p, str) else p for module, p in zip(modules, found, strict=True)]

    def run(self, parts: Sequence[Part]) -> tuple[Tensor, list[int]]:
        """Compute tokens, and keep their keys and values.

        Args:
            parts: sorted by adapter.

        Returns:
            Hidden states [T, D] after the last layer, and the first row of each part.
        """
        ids = [id for part in parts for id in part.ids]
        step, firsts = self._plan(parts)
        x_TD = self._embed(torch.tensor(ids, device=self.device))
        for number, layer in enumerate(self._layers):
            x_TD = x_TD + self._attention(number, layer, x_TD, step)
            normed_TD = apply_norm(layer.post_attention_layernorm, x_TD)
            gate_TI, up_TI = self._project(number, 2, normed_TD, step)
            x_TD = x_TD + self._project(number, 3, swiglu_forward(gate_TI, up_TI), step)[0]
        return x_TD, firsts

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the logits [N, V] of hidden states after the last layer."""
        return logits_of(apply_norm(self._norm, x_ND), self._head, self.vocabulary)

    def _project(self, number: int, group: int, x_TD: Tensor, step: _Pass) -> list[Tensor]:
        """Apply the linear layers of one input, with the adapters of their rows."""
        outputs = [
            matmul(x_TD, linear.dequantized(x_TD.dtype).T, linear.bias)
            if isinstance(linear, Projection)
            else linear(x_TD)
            for linear in self._linears[number][group]
        ]
        for rows, adapter in step.adapters:
            if stacks := adapter.stacks[number][group]:
                add_adapters_([output[rows] for output in outputs], x_TD[rows], stacks)
        return outputs

    def _attention(self, number: int, layer: Any, x_TD: Tensor, step: _Pass) -> Tensor:
        module = layer.self_attn
        heads = self._project(number, 0, apply_norm(layer.input_layernorm, x_TD), step)
        query, key, value = (y.view(len(y), -1, self._width) for y in heads)
        if self._norm_heads:
            query, key = apply_norm(module.q_norm, query), apply_norm(module.k_norm, key)
        query = apply_rope_forward(query, step.cos_TW, step.sin_TW)
        key = apply_rope_forward(key, step.cos_TW, step.sin_TW)
        cache = self._cache[number]
        cache.flatten(0, 1).index_copy_(0, step.slots, torch.stack((key, value), 1))
        if step.source is not None:
            query = query.index_select(0, step.source)
        sizes = [group.parts * group.queries for group in step.groups]
        outputs = [self._attend(q, cache, group) for q, group in zip(query.split(sizes), step.groups, strict=True)]
        mixed = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        if step.place is not None:
            mixed = mixed.index_select(0, step.place)
        return self._project(number, 1, mixed.flatten(1), step)[0]

    def _attend(self, query_QHW: Tensor, cache: Tensor, group: _Group) -> Tensor:
        """Return the attention [P * C, H, W] of a group."""
        gathered = cache.index_select(0, group.table).view(group.parts, -1, 2, self._key_heads, self._width)
        key_PKLW, value_PKLW = gathered[:, :, 0].transpose(1, 2), gathered[:, :, 1].transpose(1, 2)
        mask, heads = group.mask, query_QHW.shape[1]
        if group.queries == 1:  # the heads of a group are the queries of their key head
            query = query_QHW.view(group.parts, self._key_heads, -1, self._width)
        else:
            query = query_QHW.view(group.parts, group.queries, heads, self._width).transpose(1, 2)
        if self._fp32_attention:
            query, key_PKLW, value_PKLW, mask = (x.float() for x in (query, key_PKLW, value_PKLW, mask))
        grouped = query.shape[1] != self._key_heads
        output = F.scaled_dot_product_attention(
            query, key_PKLW, value_PKLW, mask, scale=self._scale, enable_gqa=grouped
        )
        output = output if group.queries == 1 else output.transpose(1, 2)
        return output.reshape(-1, heads, self._width).to(self.dtype)

    def _plan(self, parts: Sequence[Part]) -> tuple[_Pass, list[int]]:
        """Build the index tensors of a pass, once for all layers."""
        counts = np.array([len(part.ids) for part in parts])
        starts = np.array([part.start for part in parts])
        firsts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        sizes = np.array([blocks_for(part.start + len(part.ids)) for part in parts])
        tables = np.zeros((len(parts), sizes.max()), dtype=np.int64)
        for i, part in enumerate(parts):
            tables[i, : sizes[i]] = part.blocks[: sizes[i]]
        part_of = np.repeat(np.arange(len(parts)), counts)
        positions = np.arange(counts.sum()) - (firsts - starts)[part_of]
        slots = tables[part_of, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
        groups, sources, place, queries = [], [], np.empty(len(part_of), dtype=np.int64), 0
        for members in _group(counts, sizes):
            longest, blocks = counts[members].max(), sizes[members].max()
            steps = np.minimum(np.arange(longest), counts[members][:, None] - 1)  # padding repeats the last token
            source = firsts[members][:, None] + steps
            place[source] = queries + np.arange(source.size).reshape(source.shape) - (np.arange(longest) - steps)
            sources.append(source.ravel())
            queries += source.size
            seen = starts[members][:, None] + steps + 1
            hidden = torch.from_numpy(np.arange(blocks * BLOCK_TOKENS) >= seen[:, None, :, None]).to(self.device)
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
            groups.append(_Group(len(members), int(longest), self._index(tables[members, :blocks].ravel()), mask))
        source = np.concatenate(sources)
        same = len(source) == len(place) and (source == np.arange(len(source))).all()
        cos_TW, sin_TW = self._rotate(positions)
        adapters = []
        for i, part in enumerate(parts):
            if part.adapter is not None:
                start = firsts[i]
                if adapters and adapters[-1][1] is part.adapter:
                    start = adapters.pop()[0].start
                adapters.append((slice(int(start), int(firsts[i] + counts[i])), part.adapter))
        source, place = (None, None) if same else (self._index(source), self._index(place))
        return _Pass(self._index(slots), cos_TW, sin_TW, groups, source, place, adapters), firsts.tolist()

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)).to(self.device)

    def _rotate(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [T, W] of positions, from a table that grows."""
        longest = int(positions.max()) + 1
        if self._angles is None or len(self._angles[0]) < longest:
            every = torch.arange(1 << (longest - 1).bit_length(), device=self.device)[None]
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            self._angles = tuple(angle[0] for angle in self._rotary(like, every))  # type: ignore[assignment]
        index = self._index(positions)
        cos, sin = self._angles
        return cos.index_select(0, index), sin.index_select(0, index)


def _group(counts: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Group parts of similar length, so that padding at most doubles queries and keys."""
    groups: list[list[int]] = []
    for i in np.lexsort((sizes, counts)):
        first = groups[-1][0] if groups else None
        if first is not None and counts[i] <= 2 * counts[first] and 0.5 * sizes[i] <= sizes[first] <= 2 * sizes[i]:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    return [np.array(sorted(group)) for group in groups]
