"""Read a GGUF file with transformers, and with llama.cpp if its Python package is installed."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from finetune.data.template.layout import control_pattern
from finetune.export.exporter import ExportRequest
from finetune.export.gguf.architecture import head_dim_of
from finetune.export.gguf.quantizer import llama_package
from finetune.export.verify import (
    OFFLINE,
    Answers,
    Verification,
    compare,
    open_tokenizer,
    require_same_ids,
    source_answers,
)
from finetune.models.tokenizer import quiet

# All in NFC: Qwen2's tokenizer normalizes text to NFC, llama.cpp does not.
TEXTS = (
    "Hello, world! I've 1234 reasons, don't I? It'S WE'LL.",
    "Grüße aus Köln — naïve café, “quoted” … 100 % 3.14€",
    "你好，世界！今天天气不错。こんにちは、カタカナ한국어",
    "Привет, мир! Καλημέρα κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี",
    "👋🏽 👩‍👩‍👧 🇩🇪 ∑∫√ ½ ²³ ①",
    "def f(x):\n\treturn x  +  1\r\n\n\n    # end   \n ",
    "   leading and trailing   ",
)
_TURNS = [
    {"role": "system", "content": "Be brief.\n  Really."},
    {"role": "user", "content": "Größe von 東京?\n"},
    {"role": "assistant", "content": "37 000 000 👍"},
    {"role": "user", "content": "Thanks!"},
]


def check_model(request: ExportRequest, path: Path) -> list[Verification]:
    """Compare the ids and logits of every installed reader with the source's.

    Raises:
        IntegrityError: ids differ, or the answers differ by more than the type explains (f32: at all).
    """
    texts = sample_texts(request.source)
    require_transformers_ids(path, request.source, texts)
    answers = source_answers(request.source, request.options)
    exact = request.kind == "f32"
    found = [_in_transformers(path, request.source, answers, exact)]
    if (llama := open_llama(path, max(map(len, answers.ids)))) is None:
        request.log("gguf: not compared in llama.cpp (llama-cpp-python is not installed)")
    else:
        require_llama_ids(llama, texts)
        found.append(compare(answers, lambda ids: llama_logits(llama, ids), "llama.cpp", exact=exact))
    return found


def sample_texts(folder: Path) -> dict[str, list[int]]:
    """Return texts in many scripts, a conversation and every added token, with their ids."""
    tokenizer = open_tokenizer(folder)
    texts = list(TEXTS)
    texts += [f"a{token}b {token}\n" for token in tokenizer.get_added_vocab()]
    if tokenizer.chat_template is not None:
        texts.append(tokenizer.apply_chat_template(_TURNS, tokenize=False, add_generation_prompt=True))
    return {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}


def require_transformers_ids(path: Path, source: Path, texts: dict[str, list[int]]) -> None:
    """Compare transformers' tokenizer of a GGUF file on the texts of `sample_texts`, or raise IntegrityError."""
    with quiet():
        # AutoTokenizer would read the vocabulary a second time to find the class.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name, **OFFLINE)
    own = open_tokenizer(source)
    added = control_pattern(list(own.get_added_vocab()))
    if json.loads(own.backend_tokenizer.to_str())["model"].get("byte_fallback"):
        # Its SentencePiece puts a space before a whole text that begins with none; llama.cpp also after special tokens.
        unread = re.compile(rf"^ |(?:{added.pattern})(?!$)")
    else:
        # It does not find added tokens with characters outside the byte alphabet; llama.cpp does.
        letters = set(bytes_to_unicode().values())
        unread = control_pattern([token for token in own.get_added_vocab() if not set(token) <= letters])
    readable = {text: ids for text, ids in texts.items() if not unread.search(text)}
    require_same_ids("transformers", readable, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])


def require_llama_ids(llama: Any, texts: dict[str, list[int]]) -> None:
    """Compare llama.cpp's tokenizer on the texts of `sample_texts`, or raise IntegrityError."""
    require_same_ids("llama.cpp", texts, lambda text: llama.tokenize(text.encode(), add_bos=False, special=True))


def load_gguf(path: Path, source: Path) -> Any:
    """Load a GGUF file with transformers, in fp32; source: the model folder that it was written from."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # Hides its progress bar.
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **OFFLINE)
        # transformers reads neither rope scaling nor, in some families, the width of heads; check_file has compared
        # those entries.
        like = AutoConfig.from_pretrained(source, **OFFLINE)
        config.rope_parameters = like.rope_parameters
        config.head_dim = head_dim_of(like)
        return AutoModelForCausalLM.from_pretrained(
            path.parent, config=config, dtype=torch.float32, gguf_file=path.name, **OFFLINE
        ).eval()


def _in_transformers(path: Path, source: Path, answers: Answers, exact: bool) -> Verification:
    model = load_gguf(path, source)
    return compare(answers, lambda ids: model(torch.tensor([ids])).logits[0], "transformers", exact=exact)


def open_llama(path: Path, length: int, adapter: Path | None = None) -> Any | None:
    """Open a model file in llama.cpp for texts of `length` tokens; return None if its package does not load."""
    if (llama_cpp := llama_package()) is None:
        return None
    over = {} if adapter is None else {"lora_path": str(adapter)}
    return llama_cpp.Llama(
        str(path),
        n_ctx=length,
        n_batch=length,
        logits_all=True,
        verbose=False,
        **over,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )


def llama_logits(llama: Any, ids: list[int]) -> Tensor:
    """Return the logits [T, V] of ids [T]."""
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(llama.scores[: len(ids)].copy())
