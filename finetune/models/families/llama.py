"""Llama 3: no biases, scaled rotary positions. Source: arXiv:2407.21783, and the config.json of each size."""

from __future__ import annotations

from finetune.models.families.family import ModelFamily

FAMILY = ModelFamily(
    title="Llama 3",
    model_type="llama",
    modeling="transformers.models.llama.modeling_llama",
    model="LlamaForCausalLM",
    layer="LlamaDecoderLayer",
    norm="LlamaRMSNorm",
    end_of_turn="<|eot_id|>",
    gguf="llama",
    hub_id=r"(?:Meta-)?Llama-3(?:\.\d)?-(?P<size>\d+B)(?:-.*)?",
    sizes={
        "1B": (2048, 8192, 16, 32, 8, 128256, True, 64),
        "3B": (3072, 8192, 28, 24, 8, 128256, True, 128),
        "8B": (4096, 14336, 32, 32, 8, 128256, False, 128),
        "70B": (8192, 28672, 80, 64, 8, 128256, False, 128),
    },
)
