"""A family's decoder in a GGUF file: names of tensors, settings, and the order of rows that llama.cpp rotates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from finetune.models.families import Gguf, ModelFamily, attention_window
from finetune.system.errors import ConfigError, IntegrityError

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
# Returns rows [start, stop) of a tensor.
Rows = Callable[[int, int], Tensor]
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
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_ROTATED = re.compile(r".*\.self_attn\.[qk]_proj(\.|$)")


def gguf_of(family: ModelFamily) -> Gguf:
    """Return how llama.cpp holds a family. Raises: ConfigError if it does not."""
    if family.gguf is None:
        raise ConfigError(
            f"format=gguf: no reader here opens {family.title} with its towers in GGUF\nhelp: use format=safetensors"
        )
    return family.gguf


def tensor_names(family: ModelFamily, layers: int, tied: bool) -> dict[str, str]:
    """Map the name of every tensor in transformers to its name in GGUF, in the order of the file."""
    names = {f"{family.embedding}.weight": EMBEDDING}
    weights = _NORMS | (_HEAD_NORMS if family.head_norms else {}) | LINEAR
    for layer in range(layers):
        for ours, theirs in weights.items():
            names[f"{family.layer_name(layer)}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
        for linear in family.biased:
            ours = family.linear_path(layer, linear)
            names[f"{ours}.bias"] = f"{linear_name(family, ours)}.bias"
    names[f"{family.final_norm}.weight"] = "output_norm.weight"
    if not tied:
        names[f"{family.head}.weight"] = HEAD
    return names


def linear_name(family: ModelFamily, module: str) -> str | None:
    """Map `model.layers.0.mlp.up_proj` to `blk.0.ffn_up`; other modules than a decoder layer's linears to None."""
    match = re.fullmatch(rf"{re.escape(family.decoder)}\.layers\.(\d+)\.(.+)", module)
    theirs = LINEAR.get(match[2]) if match else None
    return f"blk.{match[1]}.{theirs}" if match and theirs else None


def check_tensors(family: ModelFamily, found: Iterable[str], names: Mapping[str, str], where: str) -> None:
    """Raise IntegrityError unless a folder holds exactly these tensors; a tied head may be stored too."""
    there = set(found) - ({f"{family.head}.weight"} - names.keys())
    problems = [f"{name} is missing" for name in names if name not in there]
    problems += [f"{name} is no tensor of {family.title}" for name in sorted(there - names.keys())]
    if problems:
        raise IntegrityError(f"{where}: {'; '.join(problems[:10])}")


def head_dim_of(config: Any) -> int:
    """Return the width of a head from transformers' config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def settings(family: ModelFamily, config: Any) -> dict[str, int | float | str]:
    """Return the file's entries of an architecture from transformers' config.

    Raises:
        ConfigError: lists every setting that GGUF readers would compute differently.
    """
    layout, rope, head_dim = gguf_of(family), dict(config.rope_parameters), head_dim_of(config)
    found: dict[str, int | float | str] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if layout.any_head_dim:
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    problems = []
    window = attention_window(config.to_dict())
    if window is not None and window < config.max_position_embeddings:
        problems.append(f"sliding_window {window}")
    if config.hidden_act != "silu":
        problems.append(f"hidden_act {config.hidden_act!r}")
    if not layout.any_head_dim and head_dim * config.num_attention_heads != config.hidden_size:
        problems.append(f"head_dim {head_dim}")
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found["rope.scaling.type"] = kind
        found["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        found["rope.scaling.original_context_length"] = int(original)
        known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "type"}
        problems += [f"rope_parameters.{key}" for key in sorted(rope.keys() - known) if rope[key] is not None]
    if kind not in layout.rope_types:
        problems.append(f"rope_type {kind!r}")
    if problems:
        raise ConfigError(
            f"config.json: GGUF's {layout.architecture} does not support {', '.join(problems)}\n"
            "help: use format=safetensors"
        )
    return found


def rope_factors(config: Any) -> Tensor | None:
    """Return the divisors [head_dim / 2] of frequencies whose scale depends on their wavelength, or None."""
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "llama3":
        return None
    head_dim = head_dim_of(config)
    # In fp32, as transformers computes them: frequencies that are not scaled get a divisor of exactly 1.
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return plain / scaled


def in_gguf(family: ModelFamily, name: str, rows: Rows, head_dim: int) -> Rows:
    """Return the rows of a tensor in the order of GGUF.

    llama.cpp rotates neighbors in some architectures, transformers values that are half a head apart: those rows of
    queries and keys are interleaved.

    Args:
        name: of the tensor in transformers.
        rows: its rows, heads of `head_dim` rows each.
    """
    if not (gguf_of(family).interleaved and _ROTATED.match(name)):
        return rows

    def read(start: int, stop: int) -> Tensor:
        first = start // head_dim * head_dim
        whole = rows(first, -(-stop // head_dim) * head_dim)
        halves = whole.unflatten(0, (-1, 2, head_dim // 2))
        return halves.transpose(1, 2).flatten(0, 2)[start - first : stop - first]

    return read
