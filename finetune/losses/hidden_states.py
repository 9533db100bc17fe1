"""Final hidden states of the targets of a packed batch: the input of every loss and every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.data.batch import Batch
from finetune.models.decoder import decoder_of, family_in, text_config
from finetune.models.embedding import HostEmbedding
from finetune.models.fused import apply_norm
from finetune.ops.attention import SEGMENTED, Segments, first_places, plan_segments, round_up, take_rows
from finetune.system.accelerator import on_gpu
from finetune.towers.towers import towers_of


@dataclass(frozen=True, slots=True)
class PackedRows:
    """What one pass of the decoder layers reads, on their device.

    R rows are computed; the first U hold tokens, the last are padding.

    ids: [U], the token of each row. position_ids: [1, R], or [3, 1, R] for a batch with media.
    segments: which rows attend to each other.
    targets: [N], the row of each target. first_tokens: [U] on the CPU, the first token that each row computes.
    """

    ids: Tensor
    position_ids: Tensor
    segments: Segments
    targets: Tensor
    first_tokens: Tensor


@dataclass(frozen=True, slots=True)
class TargetStates:
    """Final normed hidden states [N, D] of a batch's targets, their labels [N], and weights [N] (None: all 1)."""

    hidden_ND: Tensor
    labels_N: Tensor
    weights_N: Tensor | None


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model, with its adapter layers; a transformers model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value]


def device_of(model: nn.Module) -> torch.device:
    """Return where a model computes. Main memory may hold its embedding, or a rank's part of its weights."""
    return next(decoder_of(base_of(model)).norm.parameters()).device


def target_states(model: nn.Module, batch: Batch, neftune_alpha: float = 0.0) -> TargetStates:
    """Return the final hidden states of a batch's targets; each document attends to itself only.

    Under segmented attention each row of the batch is computed once, however many tokens share it.

    neftune_alpha: adds uniform noise to the embeddings in training mode, scaled by alpha / sqrt(document length * D).
    Source: Jain et al. 2023, arXiv:2310.05914.
    """
    base = base_of(model)
    backbone = decoder_of(base)
    noise_alpha = neftune_alpha if model.training else 0.0
    device = device_of(base)
    lengths = torch.tensor(batch.segment_lengths)
    lengths_T = lengths.repeat_interleave(lengths)  # of each token's document
    targets, labels_T = batch.targets, batch.labels[0]
    weights_N = None if batch.weights is None else copy_together([batch.weights[0][targets]], device)[0]
    if text_config(base)._attn_implementation != SEGMENTED:
        borders = _with_borders(base, batch)
        ids, positions, tokens, labels_N = copy_together(
            [batch.input_ids[0], borders.flatten(), targets, labels_T[targets]], device
        )
        embeddings = _with_noise(_embed(base, ids, batch.input_ids[0]), lengths_T, noise_alpha)
        embeddings = with_media(base, embeddings, batch, torch.arange(batch.tokens))
        outputs = backbone(inputs_embeds=embeddings, position_ids=positions.view(borders.shape), use_cache=False)
        return TargetStates(take_rows(outputs.last_hidden_state[0], tokens, repeat=False), labels_N, weights_N)
    rows, labels_N = packed_rows(batch, device, base.dtype)
    host_ids = batch.input_ids[0][rows.first_tokens]
    # Without a name, the embeddings are free when their padded copy is made.
    states = padded(
        with_media(
            base,
            _with_noise(_embed(base, rows.ids, host_ids), lengths_T[rows.first_tokens], noise_alpha),
            batch,
            rows.first_tokens,
        ),
        rows,
    )
    angles = backbone.rotary_emb(states, rows.position_ids)
    for layer in backbone.layers:
        states = run_layer(layer, states, rows, angles)
    return TargetStates(final_states(backbone.norm, states, rows), labels_N, weights_N)


def with_media(base: PreTrainedModel, embeddings_1UD: Tensor, batch: Batch, first_tokens_U: Tensor) -> Tensor:
    """Put the embeddings of media at the rows of their placeholder tokens.

    first_tokens_U: the first token that each row computes.
    Raises: ValueError if the positions of a batch with media have one axis.
    """
    towers = getattr(base, "media_towers", None)
    if towers is not None and towers.trained and torch.is_grad_enabled():
        embeddings_1UD = embeddings_1UD + towers.no_media().to(embeddings_1UD.dtype)
    if not batch.media:
        return embeddings_1UD
    if len(batch.position_ids) != family_in(base).axes:
        raise ValueError(f"position_ids: a batch with media needs 3 axes, found {len(batch.position_ids)}")
    embedding_of_token_T = torch.full((batch.tokens,), -1)
    embedding_of_token_T[batch.media_tokens] = torch.arange(len(batch.media_tokens))
    embedding_of_row_U = embedding_of_token_T[first_tokens_U]
    rows_K = (embedding_of_row_U >= 0).nonzero().squeeze(1)
    media_MD = towers_of(base, batch.media).embeddings(batch.media)
    rows_K, chosen_K = copy_together([rows_K, embedding_of_row_U[rows_K]], embeddings_1UD.device)
    return embeddings_1UD.index_copy(1, rows_K, media_MD[chosen_K][None].to(embeddings_1UD.dtype))


def packed_rows(batch: Batch, device: torch.device, dtype: torch.dtype) -> tuple[PackedRows, Tensor]:
    """Build what a pass reads, in one copy to the device; and the labels [N] of its targets.

    dtype: of queries, keys and values.
    """
    rows, targets = round_up(batch.rows), batch.targets
    first_tokens = first_places(batch.row_of_token, batch.rows)
    segments = plan_segments(batch.segment_lengths, batch.row_of_token, rows, device, dtype)
    position_ids = F.pad(batch.position_ids[:, first_tokens], (0, rows - batch.rows))
    ids, positions, target_rows, labels_N, *indices = copy_together(
        [
            batch.input_ids[0][first_tokens],
            position_ids.flatten(),
            batch.row_of_token[targets],
            batch.labels[0][targets],
            *segments.indices(),
        ],
        device,
    )
    positions = positions.view(-1, 1, rows) if len(position_ids) > 1 else positions[None]
    return PackedRows(ids, positions, segments.with_indices(indices), target_rows, first_tokens), labels_N


def padded(embeddings_1UD: Tensor, rows: PackedRows) -> Tensor:
    """Return the states [1, R, D] before the first layer from the embeddings of the rows' tokens."""
    return F.pad(embeddings_1UD, (0, 0, 0, rows.segments.rows - embeddings_1UD.shape[1]))


def run_layer(layer: nn.Module, states_1RD: Tensor, rows: PackedRows, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Apply a decoder layer. angles: of `rotary_emb(states, rows.position_ids)`."""
    return layer(
        states_1RD,
        attention_mask=None,
        position_ids=rows.position_ids,
        position_embeddings=angles,
        segments=rows.segments,
    )


def final_states(norm: nn.Module, states_1RD: Tensor, rows: PackedRows) -> Tensor:
    """Return the final normed states [N, D] of the targets: only their rows are normed."""
    hidden_ND = take_rows(states_1RD[0], rows.targets, repeat=rows.segments.shared)
    # The kernel saves one tensor where the module saves five in fp32. On a CPU it would change the bits of old runs.
    return apply_norm(norm, hidden_ND) if on_gpu(hidden_ND) else norm(hidden_ND)


def copy_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors [n] of one dtype to a device in one piece, without waiting for it."""
    if not on_gpu(device):
        return list(tensors)
    whole = torch.cat(list(tensors)).pin_memory()
    return list(whole.to(device, non_blocking=True).split([len(tensor) for tensor in tensors]))


def _embed(base: PreTrainedModel, ids_U: Tensor, host_ids_U: Tensor) -> Tensor:
    """Return the embeddings [1, U, D] of ids that are on the device and on the CPU."""
    embed: Any = base.get_input_embeddings()
    return embed((host_ids_U if isinstance(embed, HostEmbedding) else ids_U)[None])


def _with_borders(base: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the positions from which transformers detects document borders: where those of the text restart.

    [1, T]; a model with positions of three axes takes [4, 1, T], the text's and then the axes'.
    """
    if family_in(base).axes == 1:
        return batch.position_ids
    text_T = torch.cat([torch.arange(length) for length in batch.segment_lengths])
    return torch.cat([text_T[None], batch.position_ids.expand(3, -1)])[:, None]


def _with_noise(embeddings_1TD: Tensor, lengths_T: Tensor, alpha: float) -> Tensor:
    if not alpha:
        return embeddings_1TD
    bound_T = copy_together([alpha / (lengths_T * embeddings_1TD.shape[-1]).float().sqrt()], embeddings_1TD.device)[0]
    noise = torch.rand_like(embeddings_1TD, dtype=torch.float32).mul_(2).sub_(1) * bound_T[None, :, None]
    return embeddings_1TD + noise.to(embeddings_1TD.dtype)
