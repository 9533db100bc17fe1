"""Small model folders for GGUF exports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from finetune.config.command_options import ExportOptions
from finetune.export.exporter import ExportRequest
from tests.models import save_tiny_base

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save_model(
    folder: Path, tokenizer: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **config: Any
) -> Path:
    """Save a small random model with the tokenizer of a folder; config: fields of Qwen2Config."""
    small = {"vocab_size": 896, "intermediate_size": 96, "eos_token_id": 882, "max_position_embeddings": 512}
    save_tiny_base(folder, max_shard_size=shard, noise=0.1, dtype=dtype, **small | config)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder)
    return folder


def request(source: Path, folder: Path, logged: list[str] | None = None, **options: Any) -> ExportRequest:
    """Build an export request of `source` into a new folder, compared on few tokens."""
    folder.mkdir(exist_ok=True)
    chosen = {"format": "gguf", "out": str(folder), "prompts": 2, "tokens": 8} | options
    return ExportRequest(source, folder, ExportOptions(**chosen), (logged if logged is not None else []).append)
