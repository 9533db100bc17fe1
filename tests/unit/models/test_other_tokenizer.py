"""`model.tokenizer`: another model's tokenizer in place of the base's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from finetune.config.schema import ModelConfig
from finetune.models.tokenizer import load_tokenizer
from finetune.system.errors import ConfigError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(folder, words, rows)`: a folder with a tokenizer of these words, a config with so many rows, or both."""

    def write_folder(name: str, words: dict[str, int] | None = None, rows: int | None = None) -> str:
        folder = tmp_path / name
        folder.mkdir()
        if words is not None:
            backend = Tokenizer(models.WordLevel(words, unk_token="a"))
            PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a").save_pretrained(folder)
        if rows is not None:
            shape = dict.fromkeys(["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"], 8)
            shape |= {"num_key_value_heads": 2, "vocab_size": rows, "tie_word_embeddings": True}
            (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **shape}))
        return str(folder)

    return write_folder


def test_model_tokenizer_replaces_the_tokenizer_of_the_base(write: Write):
    # As R1-Distill's: what both have stands where it stood, a row that had another name has a new one.
    own = write("base", {"a": 0, "b": 1, "old": 2}, rows=4)
    other = write("other", {"a": 0, "b": 1, "new": 2, "more": 3})
    tokenizer = load_tokenizer(ModelConfig(name=own, tokenizer=other))
    assert (tokenizer.get_vocab(), tokenizer.name_or_path) == ({"a": 0, "b": 1, "new": 2, "more": 3}, other)
    assert load_tokenizer(ModelConfig(name=own)).convert_tokens_to_ids("old") == 2


def test_ids_beyond_the_embedding_are_an_error_with_both_numbers(write: Write):
    own, other = write("base", rows=1000), write("other", {"a": 0, "b": 1000})
    with pytest.raises(ConfigError, match=r"model\.tokenizer=.*other: .*base is 999, found 1,000"):
        load_tokenizer(ModelConfig(name=own, tokenizer=other))


def test_a_tokenizer_with_other_ids_is_an_error_with_one_token(write: Write):
    own, other = write("base", {"a": 0, "b": 1, "c": 2}, rows=8), write("other", {"a": 0, "c": 1, "b": 2})
    with pytest.raises(ConfigError, match=r"other: does not fit model\.name=.*base, found 2 tokens .* like '[bc]'"):
        load_tokenizer(ModelConfig(name=own, tokenizer=other))


@pytest.mark.parametrize("rows", [None, 2])
def test_a_base_without_a_tokenizer_accepts_another(write: Write, rows: int | None):
    own, other = write("base", rows=rows), write("other", {"a": 0, "b": 1})
    assert len(load_tokenizer(ModelConfig(name=own, tokenizer=other))) == 2


def test_another_tokenizer_with_code_or_without_files_is_an_error(write: Write):
    own, other = write("base", rows=2), write("other", {"a": 0})
    file = Path(other) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    with pytest.raises(ConfigError, match=r"model\.tokenizer=.*names code to run"):
        load_tokenizer(ModelConfig(name=own, tokenizer=other))
    with pytest.raises(ConfigError, match=r"model\.tokenizer=nowhere/at/all: not a folder"):
        load_tokenizer(ModelConfig(name=own, tokenizer="nowhere/at/all"))


def test_an_id_that_would_fill_the_memory_is_refused(write: Write):
    folder = Path(write("base", {"a": 0, "b": 1}, rows=8))
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["vocab"]["b"] = 2**32 - 1
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"tokenizer\.json has the token id 4,294,967,295"):
        load_tokenizer(ModelConfig(name=str(folder)))
