"""Tiny random models for tests: the real architecture of each family, seconds to build."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from finetune.data.encoded import Prompt
from finetune.models.families import FAMILIES
from finetune.models.skeleton import model_class
from finetune.ops import attention

_SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# What the arithmetic of a family depends on, besides the sizes above.
_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **_LLAMA3}},
    "mistral": {"head_dim": 32, "sliding_window": None},
}
_THREE_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
_TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"vision_config": _VISION},
    "qwen2_5_omni_thinker": {
        "vision_config": _VISION,
        "vision_start_token_id": 151_652,
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "output_dim": 64,
        },
    },
}


def random_qwen2(
    attn: str = attention.SEGMENTED,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    noise: float = 0.1,
    **config: Any,
) -> Qwen2ForCausalLM:
    """Build a random Qwen2.5, as `random_model`."""
    return random_model("qwen2", attn, dtype, seed=seed, noise=noise, **config)


def random_model(
    family: str,
    attn: str = attention.SEGMENTED,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    noise: float = 0.1,
    **config: Any,
) -> Any:
    """Build two layers with grouped heads; with noise, biases and norms are random too: they matter."""
    attention.register()
    record = FAMILIES[family]
    settings = _SMALL | _OF_FAMILY.get(family, {}) | config
    if record.towers:
        text = {"rope_parameters": _THREE_AXES} | settings
        settings = {"text_config": text, "tie_word_embeddings": text["tie_word_embeddings"], **_TOWERS[family]}
    kind = model_class(record)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**settings, attn_implementation=attn))
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.to(dtype)


def prompts_of(rows: Iterable[Sequence[int] | np.ndarray]) -> list[Prompt]:
    """Return prompts of text."""
    return [Prompt(np.asarray(ids, dtype=np.int32)) for ids in rows]


def save_tiny_base(
    folder: Path,
    tied: bool = True,
    vocab_size: int = 320,
    max_shard_size: str = "5GB",
    family: str = "qwen2",
    **options: Any,
) -> Path:
    """Save a random model of two layers, by default in bf16 without noise; the same arguments give the same weights."""
    base = {"vocab_size": vocab_size, "tie_word_embeddings": tied, "max_position_embeddings": 256}
    model = random_model(family, "sdpa", **{"dtype": torch.bfloat16, "noise": 0.0, **base, **options})
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
