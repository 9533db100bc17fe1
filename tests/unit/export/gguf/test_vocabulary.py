from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoTokenizer
from transformers.integrations.gguf.reader import read_gguf_metadata

from finetune.export.gguf.check import (
    open_llama,
    require_llama_ids,
    require_transformers_ids,
    sample_texts,
)
from finetune.export.gguf.model import write as to_gguf
from finetune.export.gguf.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_vocabulary
from finetune.export.verify import require_same_ids
from finetune.models.families import FAMILIES
from finetune.system.errors import ConfigError, IntegrityError
from tests.unit.export.gguf.models import TOKENIZER_FILES, request, save_model

pytest.importorskip("gguf", reason="needs the export extra")


@pytest.fixture
def tiny(repo_root: Path) -> Path:
    return repo_root / "data" / "tiny-qwen2.5"


def entries(path: Path) -> dict[str, Any]:
    keys = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
    found, _ = read_gguf_metadata(path, keys)  # 15 times as fast as the gguf package
    return {key.removeprefix("tokenizer."): value for key, value in found.items()}


def copy_tokenizer(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder of Qwen2.5's tokenizer, and a GGUF file with its vocabulary."""
    tokenizer, folder = shared / "qwen2.5" / "tokenizer", tmp_path_factory.mktemp("real")
    source = save_model(folder / "source", tokenizer, vocab_size=151_936, hidden_size=32, eos_token_id=151_645)
    to_gguf(request(source, folder / "out", type="q8_0", verify=False))
    return tokenizer, folder / "out" / "out-q8_0.gguf"


def test_the_real_tokenizer_has_the_same_ids_in_transformers(real: tuple[Path, Path]):
    tokenizer, path = real
    texts = sample_texts(tokenizer)
    assert len(texts) > 20
    require_transformers_ids(path, tokenizer, texts)
    with pytest.raises(IntegrityError):
        require_transformers_ids(path, tokenizer, {text: [*ids, 0] for text, ids in texts.items()})


def test_the_real_tokenizer_has_the_same_ids_in_llama_cpp(real: tuple[Path, Path]):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    tokenizer, path = real
    llama, texts = open_llama(path, 16), sample_texts(tokenizer)
    assert llama is not None and len(texts) > 20
    require_llama_ids(llama, texts)
    with pytest.raises(IntegrityError):
        require_llama_ids(llama, {text: [*ids, 0] for text, ids in texts.items()})


def test_the_real_vocabulary_is_padded_and_has_kinds(real: tuple[Path, Path]):
    tokenizer, path = real
    found = entries(path)
    kinds, tokens = found["ggml.token_type"], found["ggml.tokens"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == 151_936
    assert kinds.count(UNUSED) == 271
    assert (tokens[151_664], tokens[151_665], kinds[151_665]) == ("<|file_sep|>", "[PAD151665]", UNUSED)
    assert {tokens[id]: kinds[id] for id in (0, 151_643, 151_645, 151_657, 151_659)} == {
        "!": NORMAL,
        "<|endoftext|>": CONTROL,
        "<|im_end|>": CONTROL,
        "<tool_call>": USER_DEFINED,
        "<|fim_prefix|>": CONTROL,
    }
    assert len(found["ggml.merges"]) == 151_387
    assert [found[f"ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "eot")] == [
        151_643,
        151_645,
        151_643,
        151_645,
    ]
    assert found["ggml.add_bos_token"] is False
    assert found["chat_template"] == (tokenizer / "chat_template.jinja").read_text()


@pytest.mark.parametrize("part", ["merges", "pre_tokenizer", "added_tokens"])
def test_the_compared_texts_depend_on_every_part_of_a_tokenizer(part: str, tiny: Path):
    texts = sample_texts(tiny)
    content = json.loads((tiny / "tokenizer.json").read_text())
    tokenizer = Tokenizer.from_str(json.dumps(content))
    require_same_ids("itself", texts, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    if part == "pre_tokenizer":
        content[part] = content[part]["pretokenizers"][1] | {"use_regex": True}  # GPT-2's rules
    elif part == "merges":
        del content["model"][part][100:]
    else:
        del content[part][-1]
    other = Tokenizer.from_str(json.dumps(content))
    with pytest.raises(IntegrityError, match="another"):
        require_same_ids("another", texts, lambda text: other.encode(text, add_special_tokens=False).ids)


def test_new_tokens_keep_their_kind(tiny: Path, tmp_path: Path):
    source = save_model(tmp_path / "source", tiny)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([AddedToken("<|verdict|>", normalized=False), AddedToken("«Ort und Zeit»", normalized=False)])
    tokenizer.add_tokens([AddedToken("<|stop|>", normalized=False, special=True)])
    tokenizer.save_pretrained(source)
    to_gguf(request(source, tmp_path / "out", type="f32"))
    found = entries(tmp_path / "out" / "out-f32.gguf")
    new = list(zip(found["ggml.tokens"], found["ggml.token_type"], strict=True))[883:887]
    assert new == [
        ("<|verdict|>", USER_DEFINED),
        ("«Ort und Zeit»", USER_DEFINED),
        ("<|stop|>", CONTROL),
        ("[PAD886]", UNUSED),
    ]


def test_more_tokens_than_rows_are_refused(tiny: Path):
    assert len(read_vocabulary(FAMILIES["qwen2"], tiny, 883).tokens) == 883
    with pytest.raises(ConfigError, match="882 rows, found token 882"):
        read_vocabulary(FAMILIES["qwen2"], tiny, 882)


def test_the_end_of_a_turn_is_kept_beside_the_end_of_a_text(tiny: Path, tmp_path: Path):
    folder = copy_tokenizer(tiny, tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    assert read_vocabulary(FAMILIES["qwen2"], folder, 896).special_ids == {
        "bos": 880,
        "eos": 880,
        "padding": 880,
        "eot": 882,
    }


@pytest.mark.parametrize(("pattern", "adds"), [("$A", False), ("<|im_start|> $A", True), ("$A <|im_end|>", None)])
def test_only_a_bos_token_may_be_added_to_every_text(pattern: str, adds: bool | None, tiny: Path, tmp_path: Path):
    folder = copy_tokenizer(tiny, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="<|im_start|>")
    specials = [("<|im_start|>", 881), ("<|im_end|>", 882)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=specials)
    tokenizer.save_pretrained(folder)
    if adds is None:
        with pytest.raises(ConfigError, match="bos token"):
            read_vocabulary(FAMILIES["qwen2"], folder, 896)
    else:
        vocabulary = read_vocabulary(FAMILIES["qwen2"], folder, 896)
        assert vocabulary.adds_bos is adds and vocabulary.special_ids["bos"] == 881


def test_tokenizers_that_gguf_cannot_represent_are_refused(tiny: Path, tmp_path: Path):
    folder = copy_tokenizer(tiny, tmp_path / "other")
    content = json.loads((folder / "tokenizer.json").read_text())
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"\p{N}|", r"\p{N}{1,3}|")  # Llama 3's
    content["normalizer"] = {"type": "Lowercase"}
    content["added_tokens"][0]["lstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    # Qwen2Tokenizer would replace these rules by its own.
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ConfigError, match=r"pre_tokenizer: .*; normalizer: .*Lowercase; added_tokens: .*'<\|endof"):
        read_vocabulary(FAMILIES["qwen2"], folder, 896)
