"""Names of Qwen2's tensors and settings in a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from finetune.system.errors import ConfigError, IntegrityError

ARCHITECTURE = "qwen2"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_EMBEDDING_SOURCE, _HEAD_SOURCE = "model.embed_tokens.weight", "lm_head.weight"
LINEAR = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_WITH_BIAS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def tensor_names(layers: int, tied: bool) -> dict[str, str]:
    """Map the name of every tensor in transformers to its name in GGUF, in the order of the file."""
    names = {_EMBEDDING_SOURCE: EMBEDDING}
    for layer in range(layers):
        for ours, theirs in (_NORMS | LINEAR).items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
        for ours in _WITH_BIAS:
            names[f"model.layers.{layer}.{ours}.bias"] = f"blk.{layer}.{LINEAR[ours]}.bias"
    names["model.norm.weight"] = "output_norm.weight"
    if not tied:
        names[_HEAD_SOURCE] = HEAD
    return names


def linear_name(module: str) -> str | None:
    """Map `model.layers.0.mlp.up_proj` to `blk.0.ffn_up.weight`, and other modules than linear layers to None."""
    match = _LAYER.fullmatch(module)
    theirs = LINEAR.get(match[2]) if match else None
    return f"blk.{match[1]}.{theirs}.weight" if match and theirs else None


def check_tensors(found: Iterable[str], names: dict[str, str], where: str) -> None:
    """Raise IntegrityError unless a folder holds exactly these tensors; a tied head may be stored too."""
    there = set(found) - ({_HEAD_SOURCE} - names.keys())
    problems = [f"{name} is missing" for name in names if name not in there]
    problems += [f"{name} is no tensor of Qwen2" for name in sorted(there - names.keys())]
    if problems:
        raise IntegrityError(f"{where}: {'; '.join(problems[:10])}")


def settings(config: Any) -> dict[str, int | float | str]:
    """Return the file's `qwen2.*` entries from transformers' Qwen2Config.

    Raises:
        ConfigError: lists every setting that GGUF readers would compute differently.
    """
    rope = dict(config.rope_parameters)
    found: dict[str, int | float | str] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    problems = []
    if getattr(config, "use_sliding_window", False):
        problems.append("use_sliding_window")
    if config.hidden_act != "silu":
        problems.append(f"hidden_act {config.hidden_act!r}")
    if (getattr(config, "head_dim", None) or 0) not in (0, config.hidden_size // config.num_attention_heads):
        problems.append(f"head_dim {config.head_dim}")
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found["rope.scaling.type"] = kind
        found["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        found["rope.scaling.original_context_length"] = int(original)
        known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "type"}
        problems += [f"rope_parameters.{key}" for key in sorted(rope.keys() - known) if rope[key] is not None]
    elif kind not in ("default", "linear"):
        problems.append(f"rope_type {kind!r}")
    if problems:
        raise ConfigError(
            f"config.json: GGUF's qwen2 does not support {', '.join(problems)}\nhelp: use format=safetensors"
        )
    return found
