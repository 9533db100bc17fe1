"""New tokens: a row of the embedding (and of an untied head) each, and nothing else of the vocabulary, is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from finetune.system.errors import ConfigError


def plan_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, tokens: list[str]
) -> dict[str, list[int]]:
    """Ids that the new tokens will get, by module name, as PEFT's trainable_token_indices takes them.

    Raises: ConfigError if there is no tokenizer, or for tokens that it has already or that are named twice.
    """
    if not tokens:
        return {}
    if tokenizer is None:
        raise ConfigError("lora.new_tokens needs the tokenizer: attach_lora(model, cfg, tokenizer)")
    _check_new(tokenizer, tokens)
    first = max(tokenizer.get_vocab().values()) + 1
    return {name: list(range(first, first + len(tokens))) for name in _token_rows(model)}


@torch.no_grad()
def add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Adds the tokens to the tokenizer and gives their rows the mean of the rows in use, in embedding and head.

    The mean is a token as likely as any other; random rows would start far from all others. The embedding grows only if
    it has no spare rows (Qwen2.5's has hundreds). The tokens are ordinary ones, not control tokens.
    """
    used_rows = len(tokenizer)
    extend_tokenizer(tokenizer, tokens)
    ids = [tokenizer.get_vocab()[token] for token in tokens]
    if max(ids) >= embedding_rows(model):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        model.requires_grad_(False)
    for weight_VD in _token_rows(model).values():
        weight_VD[ids] = weight_VD[:used_rows].float().mean(dim=0).to(weight_VD.dtype)


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Adds the tokens to a tokenizer alone, as `attach_lora` adds them to its own: text can be encoded before the model
    is there.

    Raises: ConfigError for tokens that the vocabulary has already, or that are named twice.
    """
    _check_new(tokenizer, tokens)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])


def _check_new(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    vocabulary = tokenizer.get_vocab()
    known = [token for token in tokens if token in vocabulary]
    doubled = sorted({token for token in tokens if tokens.count(token) > 1})
    if known or doubled:
        raise ConfigError(f"lora.new_tokens: {known + doubled} are in the vocabulary already or named twice; drop them")


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding: the ids that the model can take."""
    return len(_token_rows(model)["embed_tokens"])


def _token_rows(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights with a row for each token, by module name; a tied head shares the embedding's."""
    modules: dict[str, Any] = {"embed_tokens": model.get_input_embeddings()}
    if not model.config.tie_word_embeddings:
        modules["lm_head"] = model.get_output_embeddings()
    return {name: module.weight for name, module in modules.items()}
