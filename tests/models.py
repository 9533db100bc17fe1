"""Tiny random models for tests: real Qwen2.5 architecture, seconds to build."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune.data.encoded import Prompt
from finetune.ops import attention


def random_qwen2(
    attn: str = attention.SEGMENTED,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    noise: float = 0.1,
    **config: Any,
) -> Qwen2ForCausalLM:
    """Build two layers with grouped heads; with noise, biases and norms are random too: they matter."""
    attention.register()
    small = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**small | config, attn_implementation=attn))
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.to(dtype)


def prompts_of(rows: Iterable[Sequence[int] | np.ndarray]) -> list[Prompt]:
    """Return prompts of text."""
    return [Prompt(np.asarray(ids, dtype=np.int32)) for ids in rows]


def save_tiny_base(
    folder: Path, tied: bool = True, vocab_size: int = 320, max_shard_size: str = "5GB", **options: Any
) -> Path:
    """Save a random two-layer Qwen2, by default in bf16 without noise; the same arguments give the same weights."""
    base = {"vocab_size": vocab_size, "tie_word_embeddings": tied, "max_position_embeddings": 256}
    model = random_qwen2("sdpa", **{"dtype": torch.bfloat16, "noise": 0.0, **base, **options})
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
