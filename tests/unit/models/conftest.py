"""Tiny random Qwen2 models on disk, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.load import load_base
from tests.models import save_tiny_base

MakeBase = Callable[..., Path]


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Return a function that saves a tiny base once per set of arguments and returns its folder."""
    made: dict[tuple, Path] = {}

    def make(tied: bool = True, vocab_size: int = 320, max_shard_size: str = "5GB") -> Path:
        key = (tied, vocab_size, max_shard_size)
        if key not in made:
            made[key] = save_tiny_base(tmp_path_factory.mktemp("base"), tied, vocab_size, max_shard_size)
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
    """A tokenizer of the words t0 to t299."""
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(300)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0")
