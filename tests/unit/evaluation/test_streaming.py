"""Answers that are streamed equal those of transformers' generate, greedy and sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.data.encoded import Prompt
from finetune.evaluation.streaming import stream_answer
from finetune.models.load import load_base
from finetune.system.resources import packaged


@pytest.fixture(scope="module")
def model():
    base = ModelConfig(name=str(packaged("data") / "tiny-qwen2.5"), dtype="float32")
    return load_base(base, QuantConfig(type="none", double=False), torch.device("cpu"))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize(
    "settings",
    [{}, {"repetition_penalty": 1.3, "top_k": 20, "top_p": 0.8}, {"top_k": 0}],
    ids=["none", "qwen", "no top_k"],
)
def test_a_streamed_answer_has_the_tokens_of_generate(model, monkeypatch, temperature, settings):
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**settings))
    ids = np.arange(40, 60, dtype=np.int32)
    chosen = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    chosen |= {} if temperature else {"repetition_penalty": 1.0}
    torch.manual_seed(5)
    expected = model.generate(
        torch.from_numpy(ids.astype(np.int64))[None],
        generation_config=GenerationConfig(max_new_tokens=24, eos_token_id=[882, 880], pad_token_id=880, **chosen),
    )[0, len(ids) :]
    torch.manual_seed(5)
    found: list[int] = []
    options = {"max_new_tokens": 24, "stop_ids": [882, 880], "temperature": temperature}
    stream_answer(model, Prompt(ids), found.append, **options)
    assert found == expected.tolist()
