"""Fine-tune Qwen2.5 models in 4-bit: from a YAML to a trained QLoRA adapter."""

from __future__ import annotations

__version__ = "0.1.0"
