"""The language model inside a loaded base: its family, its settings, and the module with the decoder layers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from finetune.models.families import ModelFamily, family_of


def family_in(base: PreTrainedModel) -> ModelFamily:
    """Return the record of a transformers model's family."""
    return family_of(base.config.model_type, "the model")


def decoder_of(base: PreTrainedModel) -> Any:
    """Return the module with `embed_tokens`, `layers`, `rotary_emb` and `norm`."""
    return base.get_submodule(family_in(base).decoder)


def text_config(base: PreTrainedModel) -> Any:
    """Return the settings of the decoder."""
    return base.config.get_text_config(decoder=True)
