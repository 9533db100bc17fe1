"""New tokens: only their rows of the embedding (and of an untied head) are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.models.tokenizer import check_new, extend_tokenizer
from finetune.system.errors import ConfigError


def plan_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, tokens: list[str]
) -> dict[str, list[int]]:
    """Return the ids of the new tokens by module name, for PEFT's trainable_token_indices.

    Raises:
        ConfigError: no tokenizer, or a token is already in the vocabulary or listed twice.
    """
    if not tokens:
        return {}
    if tokenizer is None:
        raise ConfigError("lora.new_tokens: needs the tokenizer\nhelp: attach_lora(model, cfg, tokenizer)")
    check_new(tokenizer, tokens)
    first = max(tokenizer.get_vocab().values()) + 1
    return {name: list(range(first, first + len(tokens))) for name in _token_rows(model)}


@torch.no_grad()
def add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Add tokens to the tokenizer and set their rows in embedding and head to the mean of the rows in use.

    Random rows would be far from all others. The embedding grows only if it has no spare rows; Qwen2.5 has hundreds.
    The tokens are ordinary ones, not control tokens.
    """
    used_rows = len(tokenizer)
    extend_tokenizer(tokenizer, tokens)
    ids = [tokenizer.get_vocab()[token] for token in tokens]
    if max(ids) >= embedding_rows(model):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        model.requires_grad_(False)
    for weight_VD in _token_rows(model).values():
        weight_VD[ids] = weight_VD[:used_rows].float().mean(dim=0).to(weight_VD.dtype)


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of the embedding: the token ids that the model supports."""
    return len(_token_rows(model)["embed_tokens"])


def _token_rows(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights with a row per token, by module name; a tied head shares those of the embedding."""
    modules: dict[str, Any] = {"embed_tokens": model.get_input_embeddings()}
    if not model.config.tie_word_embeddings:
        modules["lm_head"] = model.get_output_embeddings()
    return {name: module.weight for name, module in modules.items()}
