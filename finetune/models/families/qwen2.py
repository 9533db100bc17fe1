"""Qwen2 and Qwen2.5, with Coder and Math. Source: arXiv:2412.15115, and the config.json of Qwen/Qwen2.5-<size>."""

from __future__ import annotations

from finetune.models.families.family import Gguf, ModelFamily

BIASED = ("q_proj", "k_proj", "v_proj")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FAMILY = ModelFamily(
    title="Qwen2.5",
    model_type="qwen2",
    modeling="transformers.models.qwen2.modeling_qwen2",
    model="Qwen2ForCausalLM",
    layer="Qwen2DecoderLayer",
    norm="Qwen2RMSNorm",
    biased=BIASED,
    window="if use_sliding_window",
    gguf=Gguf("qwen2", {"qwen2": SPLIT}),
    # Instruct, Coder and Math variants of a size have the same shapes.
    hub_id=r"Qwen2\.5(?:-Coder|-Math)?-(?P<size>[\d.]+B)(?:-.*)?",
    sizes={
        "0.5B": (896, 4864, 24, 14, 2, 151936, True, 64),
        "1.5B": (1536, 8960, 28, 12, 2, 151936, True, 128),
        "3B": (2048, 11008, 36, 16, 2, 151936, True, 128),
        "7B": (3584, 18944, 28, 28, 4, 152064, False, 128),
        "14B": (5120, 13824, 48, 40, 8, 152064, False, 128),
        "32B": (5120, 27648, 64, 40, 8, 152064, False, 128),
        "72B": (8192, 29568, 80, 64, 8, 152064, False, 128),
    },
)
