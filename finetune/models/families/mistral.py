"""Mistral 7B and NeMo: no biases. Source: arXiv:2310.06825, and the config.json of each size."""

from __future__ import annotations

from finetune.models.families.family import Gguf, ModelFamily

# NeMo's tokenizer, Tekken. That of the 7B is SentencePiece, which has no regex.
_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILY = ModelFamily(
    title="Mistral",
    model_type="mistral",
    modeling="transformers.models.mistral.modeling_mistral",
    model="MistralForCausalLM",
    layer="MistralDecoderLayer",
    norm="MistralRMSNorm",
    window="always",
    end_of_turn="</s>",
    gguf=Gguf("llama", {"tekken": _SPLIT}, interleaved=True, any_head_dim=True),
    # Version 0.3 alone has this vocabulary, and no window.
    hub_id=r"Mistral-(?P<size>7B(?=-.*v0\.3)|Nemo)-.*",
    sizes={
        "7B": (4096, 14336, 32, 32, 8, 32768, False, 128),
        "NEMO": (5120, 14336, 40, 32, 8, 131072, False, 128),
    },
)
