"""Llama 3: no biases, scaled rotary positions. Source: arXiv:2407.21783, and the config.json of each size."""

from __future__ import annotations

from finetune.models.families.family import Gguf, ModelFamily

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILY = ModelFamily(
    title="Llama 3",
    model_type="llama",
    modeling="transformers.models.llama.modeling_llama",
    model="LlamaForCausalLM",
    layer="LlamaDecoderLayer",
    norm="LlamaRMSNorm",
    end_of_turn="<|eot_id|>",
    gguf=Gguf(
        "llama",
        {"llama-bpe": _SPLIT},
        rope_types=("default", "linear", "yarn", "llama3"),
        interleaved=True,
        any_head_dim=True,
    ),
    hub_id=r"(?:Meta-)?Llama-3(?:\.\d)?-(?P<size>\d+B)(?:-.*)?",
    sizes={
        "1B": (2048, 8192, 16, 32, 8, 128256, True, 64),
        "3B": (3072, 8192, 28, 24, 8, 128256, True, 128),
        "8B": (4096, 14336, 32, 32, 8, 128256, False, 128),
        "70B": (8192, 28672, 80, 64, 8, 128256, False, 128),
    },
)
