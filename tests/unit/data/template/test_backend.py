"""The tokenizer that a chat template keeps."""

from __future__ import annotations

import json
import re

import pytest

from finetune.config.schema import ModelConfig
from finetune.data.template.chat import ChatTemplate
from finetune.models.tokenizer import load_tokenizer
from finetune.system.errors import DataError
from finetune.system.resources import packaged


def test_pieces_of_a_vocabulary_that_do_not_fit_each_other_are_an_error_of_ours():
    chat = ChatTemplate(load_tokenizer(ModelConfig(name=str(packaged("data") / "tiny-qwen2.5"))))
    definition = json.loads(chat._definition)
    first = "".join(definition["model"]["merges"][0])
    del definition["model"]["vocab"][first]
    chat._definition = json.dumps(definition)
    with pytest.raises(DataError, match=f"the tokenizer is damaged: .*{re.escape(first)}"):
        _ = chat.backend


def test_a_tokenizer_that_drops_a_text_puts_nothing_before_it():
    chat = ChatTemplate(load_tokenizer(ModelConfig(name=str(packaged("data") / "tiny-qwen2.5"))))
    definition = json.loads(chat._definition)
    definition["normalizer"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    chat._definition = json.dumps(definition)
    assert chat.text_start == []
