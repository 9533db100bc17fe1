"""Final hidden states of a packed batch: the input of every loss and every evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.data.batch import Batch
from finetune.ops.attention import SEGMENTED, Segments, first_places, plan_segments, round_up


@dataclass(frozen=True, slots=True)
class DecoderRows:
    """Input of the decoder layers under segmented attention: R rows, of which the last are padding.

    states [1, R, D]: embeddings. position_ids [1, R]. segments: which rows attend to each other.
    """

    states: Tensor
    position_ids: Tensor
    segments: Segments


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model, with its adapter layers; a transformers model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value]


def hidden_states(model: nn.Module, batch: Batch, neftune_alpha: float = 0.0) -> Tensor:
    """Return final normed hidden states [T, D] of a packed batch; each document attends to itself only.

    Under segmented attention each row of the batch is computed once, however many tokens share it.

    neftune_alpha: adds uniform noise to the embeddings in training mode, scaled by alpha / sqrt(document length * D).
    Source: Jain et al. 2023, arXiv:2310.05914.
    """
    base = base_of(model)
    backbone = getattr(base, base.base_model_prefix)
    noise_alpha = neftune_alpha if model.training else 0.0
    embed = base.get_input_embeddings()
    lengths = torch.tensor(batch.segment_lengths)
    lengths_T = lengths.repeat_interleave(lengths)  # of each token's document
    if base.config._attn_implementation != SEGMENTED:
        # transformers detects document borders where positions restart.
        embeddings = _with_noise(embed(batch.input_ids), lengths_T, noise_alpha)
        outputs = backbone(inputs_embeds=embeddings, position_ids=batch.position_ids, use_cache=False)
        return outputs.last_hidden_state[0]
    first_tokens = first_places(batch.row_of_token, batch.rows)
    chosen = first_tokens.to(batch.input_ids.device)
    embeddings = _with_noise(embed(batch.input_ids[:, chosen]), lengths_T[first_tokens], noise_alpha)
    rows = decoder_rows(embeddings, batch, chosen)
    outputs = backbone(
        inputs_embeds=rows.states,
        position_ids=rows.position_ids,
        use_cache=False,
        # transformers takes a mapping as finished masks and builds no dense block mask.
        attention_mask={"full_attention": None},
        segments=rows.segments,
    )
    return token_states(outputs.last_hidden_state[0], batch)


def decoder_rows(embeddings_1UD: Tensor, batch: Batch, chosen_U: Tensor) -> DecoderRows:
    """Build the padded rows of a forward pass.

    embeddings_1UD: of the tokens `chosen_U`, the first of each row: `first_places(batch.row_of_token, batch.rows)`.
    """
    rows = round_up(batch.rows)
    padding, device = rows - batch.rows, embeddings_1UD.device
    return DecoderRows(
        states=F.pad(embeddings_1UD, (0, 0, 0, padding)),
        position_ids=F.pad(batch.position_ids[:, chosen_U], (0, padding)),
        segments=plan_segments(batch.segment_lengths, batch.row_of_token, rows, device, embeddings_1UD.dtype),
    )


def token_states(rows_RD: Tensor, batch: Batch) -> Tensor:
    """Return the state of each token [T, D] from the computed rows."""
    if batch.rows == batch.tokens:
        return rows_RD[: batch.rows]
    return rows_RD[batch.row_of_token.to(rows_RD.device)]


def _with_noise(embeddings_1TD: Tensor, lengths_T: Tensor, alpha: float) -> Tensor:
    if not alpha:
        return embeddings_1TD
    bound_T = alpha / (lengths_T * embeddings_1TD.shape[-1]).float().sqrt().to(embeddings_1TD.device)
    noise = torch.rand_like(embeddings_1TD, dtype=torch.float32).mul_(2).sub_(1) * bound_T[None, :, None]
    return embeddings_1TD + noise.to(embeddings_1TD.dtype)
