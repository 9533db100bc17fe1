"""The rows of one pass: which tokens they compute, where their keys and values go, and what they attend to.

All layers read the same index tensors, which are built once in numpy.
Shapes: T tokens of a pass; of a group of parts P parts, C queries and L keys of each with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.serving.engine.adapters import LoadedAdapter
from finetune.serving.engine.blocks import BLOCK_TOKENS

# Below them, padding costs less than one more group.
_SHORT_TOKENS, _SHORT_BLOCKS = 16, 8


class Part(NamedTuple):
    """Consecutive tokens of one answer. start: position of the first. blocks: of the answer."""

    ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    adapter: LoadedAdapter | None


@dataclass(frozen=True, slots=True)
class Group:
    """Parts that attend together. table: [P * blocks], their blocks. mask: [P, 1, C, L], 0 or -inf."""

    parts: int
    queries: int
    table: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of a pass.

    ids, positions: [T]. longest: the largest position. slots: [T], places of keys and values in the blocks.
    source: [queries], the row of each query of the groups, with padding. place: [T], the query of each row. Both are
    None for the same order. adapters: slices of rows with an adapter. firsts: the first row of each part.
    """

    ids: Tensor
    positions: Tensor
    longest: int
    slots: Tensor
    groups: list[Group]
    source: Tensor | None
    place: Tensor | None
    adapters: list[tuple[slice, LoadedAdapter]]
    firsts: list[int]


def plan_rows(parts: Sequence[Part], gathered_blocks: int, device: torch.device, dtype: torch.dtype) -> Rows:
    """Build the rows of a pass.

    Args:
        parts: those of one adapter side by side.
        gathered_blocks: most blocks of a group, if it has several parts.
        device, dtype: of the tensors, and of the masks.
    """
    counts = np.array([len(part.ids) for part in parts])
    starts = np.array([part.start for part in parts])
    firsts = np.cumsum(counts) - counts
    sizes = -(-(starts + counts) // BLOCK_TOKENS)
    tables = np.zeros((len(parts), sizes.max()), dtype=np.int64)
    for i, part in enumerate(parts):
        tables[i, : sizes[i]] = part.blocks[: sizes[i]]
    part_of = np.repeat(np.arange(len(parts)), counts)
    positions = np.arange(len(part_of)) - (firsts - starts)[part_of]
    slots = tables[part_of, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS

    def tensor(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(device)

    groups, sources, place, queries = [], [], np.empty_like(part_of), 0
    for members in _groups(counts, sizes, gathered_blocks):
        most, blocks = int(counts[members].max()), int(sizes[members].max())
        steps = np.minimum(np.arange(most), counts[members][:, None] - 1)  # padding repeats the last token
        source = firsts[members][:, None] + steps
        place[source] = queries + np.arange(len(members))[:, None] * most + steps
        sources.append(source.ravel())
        queries += source.size
        hidden = np.arange(blocks * BLOCK_TOKENS) > (starts[members][:, None] + steps)[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(tensor(hidden), float("-inf"))
        groups.append(Group(len(members), most, tensor(tables[members, :blocks].ravel()), mask))
    source = np.concatenate(sources)
    ordered = len(source) == len(place) and bool((source == np.arange(len(source))).all())
    return Rows(
        tensor(np.concatenate([part.ids for part in parts])),
        tensor(positions),
        int(positions.max()),
        tensor(slots),
        groups,
        None if ordered else tensor(source),
        None if ordered else tensor(place),
        _slices(parts, firsts, counts),
        firsts.tolist(),
    )


def _groups(counts: np.ndarray, sizes: np.ndarray, most_blocks: int) -> list[np.ndarray]:
    """Group parts of similar length: padding at most doubles queries and keys. Each group is in the order of rows."""
    groups: list[list[int]] = []
    for i in np.lexsort((sizes, counts)).tolist():
        if groups:
            group = groups[-1]
            first, blocks = group[0], max(sizes[group[0]], sizes[group[-1]], sizes[i])
            one = counts[i] == counts[first] == 1  # a written token; chunks of prompts are apart
            similar = one or (counts[first] > 1 and counts[i] <= max(_SHORT_TOKENS, 2 * counts[first]))
            similar = similar and blocks <= max(_SHORT_BLOCKS, 2 * min(sizes[first], sizes[i]))
            if similar and (len(group) + 1) * blocks <= most_blocks:
                group.append(i)
                continue
        groups.append([i])
    return [np.array(sorted(group)) for group in groups]


def _slices(parts: Sequence[Part], firsts: np.ndarray, counts: np.ndarray) -> list[tuple[slice, LoadedAdapter]]:
    """Return the rows of each adapter."""
    slices: list[tuple[slice, LoadedAdapter]] = []
    for part, first, count in zip(parts, firsts.tolist(), counts.tolist(), strict=True):
        if part.adapter is None:
            continue
        if slices and slices[-1][1] is part.adapter:
            first = slices.pop()[0].start
            count = sum(len(each.ids) for each in parts if each.adapter is part.adapter)
        slices.append((slice(first, first + count), part.adapter))
    return slices
