"""Tiny random models for tests: real Qwen2.5 architecture, seconds to build, no files."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune.ops import attention


def random_qwen2(
    attn: str = attention.SEGMENTED, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Qwen2ForCausalLM:
    """Two layers, grouped heads, biases, tied embeddings, 97 tokens; biases and norms are random too: they matter."""
    attention.register()
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation=attn,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def save_tiny_base(folder: Path, tied: bool = True, vocab_size: int = 320, max_shard_size: str = "5GB") -> Path:
    """Save a random two-layer Qwen2 in bf16 into a folder; the same arguments give the same weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
