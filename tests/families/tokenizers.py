"""Small tokenizers with the rules of each family's: trained here, on the sample rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Regex as Pattern
from transformers import PreTrainedTokenizerFast

from finetune.models.families import FAMILIES
from finetune.system.resources import packaged
from tests.families import templates

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_SIZE = 420


def _texts() -> list[str]:
    rows = (packaged("data") / "sample" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    return [message["content"] for row in rows for message in json.loads(row)["messages"]]


def _byte_level(split: str, special: list[str], ordinary: list[str], ignore_merges: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Pattern(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _texts(), trainers.BpeTrainer(vocab_size=_SIZE, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    return tokenizer


def _sentencepiece(special: list[str]) -> Tokenizer:
    """Build a BPE of characters with bytes for the others, and a space before the text after each special token."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner.train_from_iterator(
        _texts(), trainers.BpeTrainer(vocab_size=_SIZE + 256, special_tokens=tokens, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(learned["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a family, or of `mistral-nemo`."""
    split = {key: next(iter(record.gguf.splits.values())) for key, record in FAMILIES.items() if record.gguf}
    names: dict[str, Any]
    match name:
        case "llama":
            special = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()
            tokenizer = _with_bos(_byte_level(split["llama"], special, [], True), special[0])
            names = {"bos_token": special[0], "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
            template = templates.LLAMA3
        case "mistral" | "mistral-nemo":
            special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
            nemo = name == "mistral-nemo"
            plain = _byte_level(split["mistral"], special, [], True) if nemo else _sentencepiece(special)
            tokenizer = _with_bos(plain, "<s>")
            names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
            template = templates.MISTRAL
        case _:
            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            media = [token for tower in FAMILIES[name].towers.values() for token in tower.placeholders.values()]
            ordinary = ["<think>", "</think>"] if name == "qwen3" else []
            tokenizer = _byte_level(split["qwen2"], [*special, *media], ordinary, False)
            tokenizer.normalizer = normalizers.NFC()
            names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
            template = templates.QWEN3 if name == "qwen3" else templates.CHATML
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = template
    return fast


def save_tokenizer(name: str, folder: Path) -> int:
    """Save the tokenizer of a family; return the number of rows that an embedding needs."""
    tokenizer = build_tokenizer(name)
    tokenizer.save_pretrained(folder)
    return max(tokenizer.get_vocab().values()) + 1
