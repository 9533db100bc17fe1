"""The final hidden states of a packed batch, which every loss and every evaluation starts from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.data.batch import Batch
from finetune.ops.attention import SEGMENTED, plan_segments, round_up


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
    token_of_row = torch.full((batch.rows,), batch.tokens).scatter_reduce_(
        0, batch.row_of_token, torch.arange(batch.tokens), "amin"
    )
    device = batch.input_ids.device
    chosen = token_of_row.to(device)
    embeddings = _with_noise(embed(batch.input_ids[:, chosen]), _lengths_of_tokens(batch)[token_of_row], noise_alpha)
    padding = round_up(batch.rows) - batch.rows
    outputs = backbone(
        inputs_embeds=F.pad(embeddings, (0, 0, 0, padding)),
        position_ids=F.pad(batch.position_ids[:, chosen], (0, padding)),
        use_cache=False,
        # A mapping is taken as masks already made, so transformers builds no dense block mask.
        attention_mask={"full_attention": None},
        segments=plan_segments(
            batch.segment_lengths, batch.row_of_token, batch.rows + padding, device, embeddings.dtype
        ),
    )
    rows_RD = outputs.last_hidden_state[0]
    if batch.rows == batch.tokens:
        return rows_RD[: batch.rows]
    return rows_RD[batch.row_of_token.to(device)]


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
