"""What tests/families proves of each family: the tests run over these lists, and docs/models.md shows them."""

from __future__ import annotations

_TEXT = ("qwen2", "qwen3", "llama", "mistral")
_ALL = (*_TEXT, "qwen2_5_vl", "qwen2_5_omni_thinker")
# By the name of a feature, the model types that pass its test.
PROVEN: dict[str, tuple[str, ...]] = {
    "chat template": _ALL,
    "fused layers": _ALL,
    "4-bit base": _ALL,
    "distillation": _ALL,
    "merge": _ALL,
    "planner": _ALL,
    "servers": _ALL,
    "GGUF": _TEXT,
    "ONNX": _TEXT,
}
