"""The tokenizer in a GGUF file: its rules, its kinds of tokens and special ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.export.gguf.architecture import gguf_of
from finetune.export.verify import open_tokenizer
from finetune.models.families import ModelFamily
from finetune.system.errors import ConfigError

# GGUF's kinds of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Qwen's tokenizer does not mark these as special; llama.cpp always treats them as special.
_FILL_IN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


# Rules of tokenizers that look for a whole word before they merge its bytes.
_WHOLE_WORDS = ("llama-bpe", "tekken")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space in a vocabulary of SentencePiece


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF file."""

    splits: str | None  # name of the rules that split a text before its bytes are merged; None: SentencePiece
    tokens: list[str]  # one for each row of the embedding
    kinds: list[int]  # of the tokens
    merges: list[str]
    special_ids: dict[str, int]  # bos, eos, padding, unknown, and eot, which ends a turn
    adds_bos: bool  # the tokenizer puts the bos token before every text
    chat_template: str | None

    def write(self, writer: Any) -> None:
        """Add the `tokenizer.*` entries to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("llama" if self.splits is None else "gpt2")
        writer.add_tokenizer_pre(self.splits or "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        if self.splits is None:
            # llama.cpp merges the pair whose token has the highest score, and reads no list of merges.
            writer.add_token_scores([float(-id) for id in range(len(self.tokens))])
            writer.add_add_space_prefix(True)
        for name, id in self.special_ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", id)
        writer.add_add_bos_token(self.adds_bos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(family: ModelFamily, folder: Path, rows: int) -> Vocabulary:
    """Read the vocabulary of a model folder; rows of the embedding without a token become unused tokens.

    Raises:
        ConfigError: llama.cpp does not know the tokenizer's rules, or it has more tokens than rows.
    """
    tokenizer = open_tokenizer(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    splits = _splits(content, gguf_of(family).splits, folder)
    ids = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    if max(ids.values()) >= rows:
        raise ConfigError(f"{folder}: the embedding has {rows} rows, found token {max(ids.values())}")
    tokens = [f"[PAD{id}]" for id in range(rows)]
    kinds = [UNUSED] * rows
    for token, id in ids.items():
        tokens[id], kinds[id] = token, BYTE if splits is None and _is_byte(token) else NORMAL
    for token in content["added_tokens"]:
        control = token["special"] or token["content"] in _FILL_IN
        kinds[token["id"]] = CONTROL if control else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    if full not in (plain, [bos, *plain]):
        raise ConfigError(f"{folder}: GGUF supports tokenizers that add a bos token alone, found {full} for {plain}")
    # Qwen has no bos. Readers invent one if the file has none, so it is the pad token, as in Qwen's own files.
    first = next((id for id in (bos, pad) if id is not None), eos)
    special_ids = {"bos": first, "eos": eos, "padding": pad, "eot": ids.get(family.end_of_turn)}
    if splits is None and (unknown := tokenizer.unk_token_id) is not None:
        special_ids["unknown"], kinds[unknown] = unknown, UNKNOWN
    special_ids = {name: id for name, id in special_ids.items() if id is not None}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Vocabulary(splits, tokens, kinds, merges, special_ids, full != plain, template)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _splits(content: dict[str, Any], known: Mapping[str, str], folder: Path) -> str | None:
    """Return the name of the rules in GGUF; None for SentencePiece. Raises: ConfigError if llama.cpp has others."""
    sentencepiece = bool(content["model"].get("byte_fallback"))
    name, problems = (None, list(_not_sentencepiece(content))) if sentencepiece else _byte_level(content, known)
    stripping = [
        token["content"]
        for token in content["added_tokens"]
        if any(token[key] for key in ("lstrip", "rstrip", "single_word"))
    ]
    if stripping:
        problems.append(f"added_tokens: lstrip, rstrip or single_word, found {', '.join(map(repr, stripping[:5]))}")
    if problems:
        raise ConfigError(f"{folder}: GGUF cannot represent the tokenizer: {'; '.join(problems)}")
    return name


def _byte_level(content: dict[str, Any], known: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """Return the name in GGUF of the rules of a byte-level tokenizer, and what llama.cpp does otherwise."""
    split, model = content["pre_tokenizer"], content["model"]
    parts = split.get("pretokenizers", [split]) if split else []
    patterns = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    levels = [part for part in parts if part["type"] == "ByteLevel"]
    name = next((name for name, regex in known.items() if patterns == [regex]), None)
    problems = []
    if model["type"] != "BPE":
        problems.append(f"model: expected BPE, found {model['type']}")
    if name is None or len(levels) != 1 or levels[0]["add_prefix_space"] or levels[0]["use_regex"]:
        problems.append(f"pre_tokenizer: other rules than {', '.join(known)}")
    elif bool(model.get("ignore_merges")) != (name in _WHOLE_WORDS):
        problems.append(f"model: ignore_merges={model.get('ignore_merges')} with the rules of {name}")
    if (content["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        problems.append(f"normalizer: expected NFC, found {content['normalizer']['type']}")
    return name, problems


def _not_sentencepiece(content: dict[str, Any]) -> Iterator[str]:
    """Yield what llama.cpp's SentencePiece does otherwise. It puts a space before the text after a special token."""
    model, split, normalizer = content["model"], content["pre_tokenizer"], content["normalizer"]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepends = [{"type": "Prepend", "prepend": _SPACE}, replaces]
    normalized = split is None and (normalizer or {}).get("normalizers") == prepends
    always = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": False}
    if not normalized and (normalizer is not None or split != always):
        yield "pre_tokenizer: expected a space before the text after every special token"
    merged = [model["vocab"]["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in model["merges"]]
    if merged != sorted(merged):
        yield "merges: not in the order of their tokens"
