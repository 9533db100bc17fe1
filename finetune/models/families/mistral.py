"""Mistral 7B and NeMo: no biases. Source: arXiv:2310.06825, and the config.json of each size."""

from __future__ import annotations

from finetune.models.families.family import ModelFamily

FAMILY = ModelFamily(
    title="Mistral",
    model_type="mistral",
    modeling="transformers.models.mistral.modeling_mistral",
    model="MistralForCausalLM",
    layer="MistralDecoderLayer",
    norm="MistralRMSNorm",
    end_of_turn="</s>",
    gguf="llama",
    hub_id=r"Mistral-(?:(?P<size>7B)-.*v0\.3|Nemo-.*)",
    sizes={"7B": (4096, 14336, 32, 32, 8, 32768, False, 128)},
)
