"""New tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.models.adapters.attach import attach_lora
from finetune.models.load import load_base
from finetune.system.errors import ConfigError

NEW = ["<call>", "<done>"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [320, 301])
def test_new_rows_start_at_the_mean_and_only_they_are_trained(
    make_base, tokenizer, tied: bool, vocab_size: int
) -> None:
    """With spare rows (320) the embedding keeps its size, with too few (301) it grows."""
    model: Any = load_base(ModelConfig(name=str(make_base(tied, vocab_size))), QuantConfig(), "cpu")
    before = {
        "embed": model.get_input_embeddings().weight.clone(),
        "head": model.get_output_embeddings().weight.clone(),
    }
    adapted = attach_lora(model, LoraConfig(new_tokens=NEW), tokenizer)

    assert tokenizer.convert_tokens_to_ids(NEW) == [300, 301]
    assert model.get_input_embeddings().weight.shape[0] == max(vocab_size, 302)
    after = {"embed": model.get_input_embeddings().weight, "head": model.get_output_embeddings().weight}
    for name, rows in before.items():
        assert after[name][:300].equal(rows[:300])
        torch.testing.assert_close(after[name][300:302], rows[:300].float().mean(0).bfloat16().expand(2, -1))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert [tuple(p.shape) for p in trained.values()] == [(2, 64)] * (1 if tied else 2)
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_new_tokens_are_ordinary_and_split_text_like_words(load, tokenizer) -> None:
    attach_lora(load("nf4"), LoraConfig(new_tokens=NEW), tokenizer)
    assert tokenizer("t7 <call> t8").input_ids == [7, 300, 8]
    assert tokenizer.decode([7, 300, 8], skip_special_tokens=True).split() == ["t7", "<call>", "t8"]


@pytest.mark.parametrize(
    ("tokens", "says"),
    [(["t7", "<x>"], r"lora\.new_tokens: .*found \['t7'\]"), (["<x>", "<x>"], r"lora\.new_tokens: .*found \['<x>'\]")],
)
def test_known_and_repeated_tokens_are_an_error(untouched, tokenizer, tokens: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        attach_lora(untouched("nf4"), LoraConfig(new_tokens=tokens), tokenizer)
    assert len(tokenizer) == 300


def test_new_tokens_need_the_tokenizer(untouched) -> None:
    with pytest.raises(ConfigError, match="needs the tokenizer"):
        attach_lora(untouched("nf4"), LoraConfig(new_tokens=NEW))
