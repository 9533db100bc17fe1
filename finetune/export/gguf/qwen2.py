"""Qwen2 in a GGUF file: names of tensors, settings, and the tokenizer with its kinds of tokens and special ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.export.verify import open_tokenizer
from finetune.models.families import FAMILIES
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
# GGUF's kinds of tokens.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# GGUF names a pre-tokenizer instead of storing its regex; `qwen2` is this one.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen's tokenizer does not mark these as special; llama.cpp always treats them as special.
_FILL_IN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


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


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF file."""

    tokens: list[str]  # one for each row of the embedding
    kinds: list[int]  # of the tokens
    merges: list[str]
    special_ids: dict[str, int]  # bos, eos, padding, eot, which ends a turn
    adds_bos: bool  # the tokenizer puts the bos token before every text
    chat_template: str | None

    def write(self, writer: Any) -> None:
        """Add the `tokenizer.*` entries to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for name, id in self.special_ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", id)
        writer.add_add_bos_token(self.adds_bos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Read the vocabulary of a model folder; rows of the embedding without a token become unused tokens.

    Raises:
        ConfigError: the tokenizer is not Qwen2's, or has more tokens than rows.
    """
    tokenizer = open_tokenizer(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    _check_qwen2(content, folder)
    ids = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    if max(ids.values()) >= rows:
        raise ConfigError(f"{folder}: the embedding has {rows} rows, found token {max(ids.values())}")
    tokens = [f"[PAD{id}]" for id in range(rows)]
    kinds = [UNUSED] * rows
    for token, id in ids.items():
        tokens[id], kinds[id] = token, NORMAL
    for token in content["added_tokens"]:
        control = token["special"] or token["content"] in _FILL_IN
        kinds[token["id"]] = CONTROL if control else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    if full not in (plain, [bos, *plain]):
        raise ConfigError(f"{folder}: GGUF supports tokenizers that add a bos token alone, found {full} for {plain}")
    # Qwen2.5 has no bos. Readers invent one if the file has none, so it is the pad token, as in Qwen's own files.
    bos = next((id for id in (bos, pad) if id is not None), eos)
    special_ids = {"bos": bos, "eos": eos, "padding": pad, "eot": ids.get(FAMILIES["qwen2"].end_of_turn)}
    special_ids = {name: id for name, id in special_ids.items() if id is not None}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Vocabulary(tokens, kinds, merges, special_ids, full != plain, template)


def _check_qwen2(content: dict[str, Any], folder: Path) -> None:
    split, model = content["pre_tokenizer"], content["model"]
    parts = split.get("pretokenizers", [split]) if split else []
    patterns = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    levels = [part for part in parts if part["type"] == "ByteLevel"]
    problems = []
    if model["type"] != "BPE" or model.get("ignore_merges") or model.get("byte_fallback"):
        problems.append(f"model: expected plain BPE, found {model['type']}")
    if patterns != [_SPLIT] or len(levels) != 1 or levels[0]["add_prefix_space"] or levels[0]["use_regex"]:
        problems.append("pre_tokenizer: other rules than Qwen2")
    if (content["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        problems.append(f"normalizer: expected NFC, found {content['normalizer']['type']}")
    stripping = [
        token["content"]
        for token in content["added_tokens"]
        if any(token[key] for key in ("lstrip", "rstrip", "single_word"))
    ]
    if stripping:
        problems.append(f"added_tokens: lstrip, rstrip or single_word, found {', '.join(map(repr, stripping[:5]))}")
    if problems:
        raise ConfigError(f"{folder}: GGUF cannot represent the tokenizer: {'; '.join(problems)}")
