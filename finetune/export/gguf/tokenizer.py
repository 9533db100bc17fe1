"""A Qwen2 tokenizer in the form of a GGUF file: tokens with their kinds, merges, special ids, chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.export.verify import open_tokenizer
from finetune.models.families import FAMILIES
from finetune.system.errors import ConfigError

# GGUF's kinds of tokens.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# GGUF names a pre-tokenizer instead of storing its regex; `qwen2` is this one.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen's tokenizer does not mark these as special; llama.cpp always treats them as special.
_FILL_IN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


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
