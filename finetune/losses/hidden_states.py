"""The final hidden states of a packed batch, which every loss and every evaluation starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.data.batch import Batch
from finetune.ops.attention import SEGMENTED, Segments, plan_segments, round_up


@dataclass(frozen=True, slots=True)
class DecoderRows:
    """What a packed batch is to the decoder layers under segmented attention: R rows, the last of them padding.

    states [1, R, D]: the embeddings; position_ids [1, R]; segments: which rows see each other.
    """

    states: Tensor
    position_ids: Tensor
    segments: Segments


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model; a transformers model itself. Adapter layers stay where they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value]


def hidden_states(model: nn.Module, batch: Batch, neftune_alpha: float = 0.0) -> Tensor:
    """Final normed hidden states [T, D] of a packed batch, each document attending to itself alone.

    Under segmented attention each of the batch's rows is computed once, whatever number of tokens it holds.

    neftune_alpha: uniform noise on the embeddings, scaled by alpha / sqrt(document length * D); only in training mode.
    Source: Jain et al. 2023, arXiv:2310.05914.
    """
    base = base_of(model)
    backbone = getattr(base, base.base_model_prefix)
    noise_alpha = neftune_alpha if model.training else 0.0
    embed = base.get_input_embeddings()
    if base.config._attn_implementation != SEGMENTED:
        # transformers finds the documents' borders where positions restart.
        embeddings = _with_noise(embed(batch.input_ids), _lengths_of_tokens(batch), noise_alpha)
        outputs = backbone(inputs_embeds=embeddings, position_ids=batch.position_ids, use_cache=False)
        return outputs.last_hidden_state[0]
    first_tokens = token_of_row(batch)
    chosen = first_tokens.to(batch.input_ids.device)
    embeddings = _with_noise(embed(batch.input_ids[:, chosen]), _lengths_of_tokens(batch)[first_tokens], noise_alpha)
    rows = decoder_rows(embeddings, batch, chosen)
    outputs = backbone(
        inputs_embeds=rows.states,
        position_ids=rows.position_ids,
        use_cache=False,
        # A mapping is taken as masks already made, so transformers builds no dense block mask.
        attention_mask={"full_attention": None},
        segments=rows.segments,
    )
    return token_states(outputs.last_hidden_state[0], batch)


def token_of_row(batch: Batch) -> Tensor:
    """The first token [U] of each row in use, on the CPU: what the row's embedding is taken from."""
    return torch.full((batch.rows,), batch.tokens).scatter_reduce_(
        0, batch.row_of_token, torch.arange(batch.tokens), "amin"
    )


def decoder_rows(embeddings_1UD: Tensor, batch: Batch, chosen_U: Tensor) -> DecoderRows:
    """The rows of a forward pass, padded.

    chosen_U: from `token_of_row`, on the batch's device as are the embeddings, which are those of these tokens.
    """
    rows = round_up(batch.rows)
    padding, device = rows - batch.rows, embeddings_1UD.device
    return DecoderRows(
        states=F.pad(embeddings_1UD, (0, 0, 0, padding)),
        position_ids=F.pad(batch.position_ids[:, chosen_U], (0, padding)),
        segments=plan_segments(batch.segment_lengths, batch.row_of_token, rows, device, embeddings_1UD.dtype),
    )


def token_states(rows_RD: Tensor, batch: Batch) -> Tensor:
    """What each token [T, D] has of the rows that a forward pass computed."""
    if batch.rows == batch.tokens:
        return rows_RD[: batch.rows]
    return rows_RD[batch.row_of_token.to(rows_RD.device)]


def _lengths_of_tokens(batch: Batch) -> Tensor:
    """The length of the document that each token belongs to."""
    lengths = torch.tensor(batch.segment_lengths)
    return lengths.repeat_interleave(lengths)


def _with_noise(embeddings_1TD: Tensor, lengths_T: Tensor, alpha: float) -> Tensor:
    if not alpha:
        return embeddings_1TD
    bound_T = alpha / (lengths_T * embeddings_1TD.shape[-1]).float().sqrt().to(embeddings_1TD.device)
    noise = torch.rand_like(embeddings_1TD, dtype=torch.float32).mul_(2).sub_(1) * bound_T[None, :, None]
    return embeddings_1TD + noise.to(embeddings_1TD.dtype)
