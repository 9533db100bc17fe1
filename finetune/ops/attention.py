"""Causal attention over packed segments without a mask.

A packed row of T tokens holds S documents. A dense block mask costs T * T whatever the documents' lengths. Here the
documents of about one length are laid out as a batch, padded on the right: under causal attention no token sees what
comes after it, so the padding needs no mask, and the kernel keeps its causal skip and native grouped heads. Lengths
are rounded up to few distinct ones, because CPU kernels are compiled anew for each shape.

Shapes: B batch (1 when packed), H heads, T tokens, D head width, P tokens of the padded layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

SEGMENTED = "segmented"
_ROUNDING = 64
# Below this the backward pass of the CPU's fused kernel takes three times as long as plain matrix products (bf16, 64
# tokens: 124 against 43 ms); above it the fused kernel wins.
_FUSED_FROM_ON_CPU = 129


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the tokens of a packed row lie in a layout of padded documents, grouped by rounded length.

    groups: (documents, rounded length) of each group; source [P]: the token that fills each place (any, for padding);
    place [T]: where each token went. Tokens of the row: T.
    """

    groups: tuple[tuple[int, int], ...]
    source: Tensor
    place: Tensor


def plan_segments(lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
    """The padded layout of documents of these lengths, in tokens, laid end to end."""
    grouped: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in lengths:
        rounded = -(-length // _ROUNDING) * _ROUNDING
        grouped.setdefault(rounded, []).append((start, length))
        start += length
    source, place, offset = [], torch.empty(start, dtype=torch.int64), 0
    for rounded, documents in grouped.items():
        for first, length in documents:
            source.append(first + torch.arange(rounded).clamp_(max=length - 1))
            place[first : first + length] = offset + torch.arange(length)
            offset += rounded
    groups = tuple((len(documents), rounded) for rounded, documents in grouped.items())
    return Segments(groups, torch.cat(source).to(device), place.to(device))


def segmented_attention(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention that never looks across a segment's border; plain SDPA when no segments are given.

    segments: the caller passes them as a keyword of the model's forward.
    Returns: [B, T, H, D] and None (no attention weights), as transformers expects of an attention function.
    Raises: ValueError if the segments don't cover the T tokens or a mask is given beside them.
    """
    if segments is None:
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)
    if attention_mask is not None or len(segments.place) != query_BHTD.shape[2]:
        raise ValueError(
            f"segmented attention takes segments that cover the {query_BHTD.shape[2]} tokens given, and no mask; got "
            f"segments of {len(segments.place)} and {'a' if attention_mask is not None else 'no'} mask"
        )
    sizes = [documents * length for documents, length in segments.groups]
    padded = [x[0].transpose(0, 1)[segments.source].split(sizes) for x in (query_BHTD, key_BHTD, value_BHTD)]
    outputs = []
    for (documents, length), *parts in zip(segments.groups, *padded, strict=True):
        q, k, v = (part.unflatten(0, (documents, length)).transpose(1, 2) for part in parts)
        outputs.append(_causal_attention(module, q, k, v, **kwargs).flatten(0, 1))
    return torch.cat(outputs)[segments.place][None], None


def _causal_attention(
    module: torch.nn.Module, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, **kwargs
) -> Tensor:
    """[B, T, H, D] of a batch of documents of one length, by the kernel that is fast at that length."""
    length = query_BHTD.shape[2]
    if query_BHTD.device.type == "cpu" and length < _FUSED_FROM_ON_CPU:
        causal = torch.full((length, length), float("-inf"), dtype=query_BHTD.dtype).triu(1)[None, None]
        return eager_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, causal, **kwargs)[0]
    return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, None, **kwargs)[0]


def register() -> None:
    """Make `attn_implementation="segmented"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(SEGMENTED, segmented_attention)
    AttentionMaskInterface.register(SEGMENTED, sdpa_mask)
