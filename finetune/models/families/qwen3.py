"""Qwen3, dense: normed queries and keys, no biases. Source: arXiv:2505.09388, and the config.json of each size."""

from __future__ import annotations

from finetune.models.families.family import Gguf, ModelFamily
from finetune.models.families.qwen2 import SPLIT

FAMILY = ModelFamily(
    title="Qwen3",
    model_type="qwen3",
    modeling="transformers.models.qwen3.modeling_qwen3",
    model="Qwen3ForCausalLM",
    layer="Qwen3DecoderLayer",
    norm="Qwen3RMSNorm",
    head_norms=True,
    window="if use_sliding_window",
    gguf=Gguf("qwen3", {"qwen2": SPLIT}, any_head_dim=True),
    hub_id=r"Qwen3-(?P<size>[\d.]+B)(?:-.*)?",
    sizes={
        "0.6B": (1024, 3072, 28, 16, 8, 151936, True, 128),
        "1.7B": (2048, 6144, 28, 16, 8, 151936, True, 128),
        "4B": (2560, 9728, 36, 32, 8, 151936, True, 128),
        "8B": (4096, 12288, 36, 32, 8, 151936, False, 128),
        "14B": (5120, 17408, 40, 40, 8, 151936, False, 128),
        "32B": (5120, 25600, 64, 64, 8, 151936, False, 128),
    },
)
