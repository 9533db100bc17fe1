"""Causal attention over packed segments without a dense mask.

A packed row of T tokens holds S documents. A dense block mask costs T * T whatever the documents' lengths; one
scaled-dot-product call a document costs the sum of their squares and keeps the causal skip and native grouped heads.

Shapes: B batch (1 when packed), H heads, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENTED = "segmented"


def segmented_attention(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    segment_lengths: Sequence[int] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention that never looks across a segment's border; plain SDPA when no segments are given.

    segment_lengths: lengths in tokens, summing to T; the caller passes them as a keyword of the model's forward.
    Returns: [B, T, H, D] and None (no attention weights), as transformers expects of an attention function.
    Raises: ValueError if the lengths don't sum to T or a mask is given beside them.
    """
    if segment_lengths is None:
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)
    if attention_mask is not None or sum(segment_lengths) != query_BHTD.shape[2]:
        raise ValueError(
            f"segmented attention takes segment lengths that sum to the {query_BHTD.shape[2]} tokens given, and no mask; "
            f"got a sum of {sum(segment_lengths)} and {'a' if attention_mask is not None else 'no'} mask"
        )
    parts = zip(*(x.split(list(segment_lengths), dim=2) for x in (query_BHTD, key_BHTD, value_BHTD)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in parts]
    return torch.cat(outputs, dim=1), None


def register() -> None:
    """Make `attn_implementation="segmented"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(SEGMENTED, segmented_attention)
    AttentionMaskInterface.register(SEGMENTED, sdpa_mask)
