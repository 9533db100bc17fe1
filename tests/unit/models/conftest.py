"""Tiny random Qwen2 models on disk, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.load import load_base

MakeBase = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Writes a random two-layer Qwen2 in bf16 and gives its folder; the same arguments give the same folder."""
    made: dict[tuple, Path] = {}

    def make(tied: bool = True, vocab_size: int = 320, max_shard_size: str = "5GB") -> Path:
        key = (tied, vocab_size, max_shard_size)
        if key not in made:
            torch.manual_seed(0)
            config = Qwen2Config(
                vocab_size=vocab_size,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                tie_word_embeddings=tied,
            )
            made[key] = tmp_path_factory.mktemp("base")
            Qwen2ForCausalLM(config).bfloat16().save_pretrained(made[key], max_shard_size=max_shard_size)
        return made[key]

    return make


@pytest.fixture
def load(make_base: MakeBase) -> Callable[..., Any]:
    """`load(quant_type, tied=…, dtype=…, keep=…)`: a fresh tiny model, loaded by the package."""

    def load_tiny(quant_type: Any = "nf4", tied: bool = True, dtype: Any = "bfloat16", **quant) -> Any:
        model = ModelConfig(name=str(make_base(tied=tied)), dtype=dtype)
        return load_base(model, QuantConfig(type=quant_type, **quant), device="cpu")

    return load_tiny


@pytest.fixture(scope="session")
def untouched(make_base: MakeBase) -> Callable[[str], Any]:
    """`untouched(quant_type)`: a tiny tied model that all tests share, so none may change it."""
    loaded: dict[str, Any] = {}

    def load_once(quant_type: Any) -> Any:
        if quant_type not in loaded:
            loaded[quant_type] = load_base(
                ModelConfig(name=str(make_base())), QuantConfig(type=quant_type), device="cpu"
            )
        return loaded[quant_type]

    return load_once


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Knows the words t0 to t299."""
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(300)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0")
