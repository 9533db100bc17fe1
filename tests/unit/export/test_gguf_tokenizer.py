from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")

from finetune.errors import ConfigError, IntegrityError
from finetune.export.gguf_check import require_same_ids, sample_texts
from finetune.export.gguf_model import to_gguf
from finetune.export.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_vocabulary
from tests.unit.export.gguf_models import TOKENIZER_FILES, job, save_model


@pytest.fixture
def tiny(repo_root: Path) -> Path:
    return repo_root / "data" / "tiny-qwen2.5"


def entry(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).get_field(f"tokenizer.{key}").contents()


def copy_tokenizer(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def test_the_real_tokenizer_reads_back_with_the_same_ids(shared: Path, tmp_path: Path):
    real = shared / "qwen2.5" / "tokenizer"
    config = {"vocab_size": 151_936, "hidden_size": 32, "eos_token_id": 151_645}
    source = save_model(tmp_path / "source", real, **config)
    # The export compares ids itself, in transformers and where it is there in llama.cpp.
    exported = to_gguf(job(source, tmp_path / "out", type="q8_0", prompts=1))
    path = tmp_path / "out" / "out-q8_0.gguf"
    kinds, tokens = entry(path, "ggml.token_type"), entry(path, "ggml.tokens")
    assert len(tokens) == len(kinds) == len(set(tokens)) == 151_936
    assert exported.notes["unused_tokens"] == kinds.count(UNUSED) == 271
    assert (tokens[151_664], tokens[151_665], kinds[151_665]) == ("<|file_sep|>", "[PAD151665]", UNUSED)
    assert {tokens[id]: kinds[id] for id in (0, 151_643, 151_645, 151_657, 151_659)} == {
        "!": NORMAL, "<|endoftext|>": CONTROL, "<|im_end|>": CONTROL, "<tool_call>": USER_DEFINED,
        "<|fim_prefix|>": CONTROL,
    }  # fmt: skip
    assert len(entry(path, "ggml.merges")) == 151_387
    assert [entry(path, f"ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot")] == [
        151_643, 151_645, 151_643, 151_645,
    ]  # fmt: skip
    assert entry(path, "ggml.add_bos_token") is False
    assert entry(path, "chat_template") == (real / "chat_template.jinja").read_text()


def test_the_compared_texts_need_every_part_of_a_tokenizer(tiny: Path, tmp_path: Path):
    texts = sample_texts(tiny)
    assert any("<|im_start|>user" in text for text in texts)
    for token, id in AutoTokenizer.from_pretrained(tiny).get_added_vocab().items():
        assert any(token in text and id in ids for text, ids in texts.items())
    content = json.loads((tiny / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    for change in (
        lambda: merges.pop(300),
        lambda: content["pre_tokenizer"].update(content["pre_tokenizer"]["pretokenizers"][1] | {"use_regex": True}),
        lambda: content["added_tokens"].pop(),
    ):
        whole = json.dumps(content)
        change()
        other = copy_tokenizer(tiny, tmp_path / str(len(list(tmp_path.iterdir()))))
        (other / "tokenizer.json").write_text(json.dumps(content))
        read = json.loads((other / "tokenizer.json").read_text())
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(json.dumps(read))
        with pytest.raises(IntegrityError, match="is not its source's"):
            require_same_ids("x", texts, lambda text, t=tokenizer: t.encode(text, add_special_tokens=False).ids)
        content.update(json.loads(whole))


def test_new_tokens_are_kept_whole_and_shown(tiny: Path, tmp_path: Path):
    source = save_model(tmp_path / "source", tiny)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([AddedToken("<|verdict|>", normalized=False), AddedToken("«Ort und Zeit»", normalized=False)])
    tokenizer.add_tokens([AddedToken("<|stop|>", normalized=False, special=True)])
    tokenizer.save_pretrained(source)
    to_gguf(job(source, tmp_path / "out", type="f32"))
    path = tmp_path / "out" / "out-f32.gguf"
    new = list(zip(entry(path, "ggml.tokens"), entry(path, "ggml.token_type"), strict=True))[883:887]
    assert new == [("<|verdict|>", USER_DEFINED), ("«Ort und Zeit»", USER_DEFINED), ("<|stop|>", CONTROL),
                   ("[PAD886]", UNUSED)]  # fmt: skip


def test_more_tokens_than_rows_are_refused(tiny: Path):
    assert len(read_vocabulary(tiny, 883).tokens) == 883
    with pytest.raises(ConfigError, match="has token 882, the embedding only 882 rows"):
        read_vocabulary(tiny, 882)


def test_what_ends_a_turn_is_said_besides_what_ends_a_text(tiny: Path, tmp_path: Path):
    folder = copy_tokenizer(tiny, tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    assert read_vocabulary(folder, 896).special_ids == {"bos": 880, "eos": 880, "padding": 880, "eot": 882}


def test_a_tokenizer_that_adds_bos_says_so(tiny: Path, tmp_path: Path):
    assert not read_vocabulary(tiny, 896).adds_bos
    folder = copy_tokenizer(tiny, tmp_path / "bos")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": True, "bos_token": "<|im_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = read_vocabulary(folder, 896)
    assert vocabulary.adds_bos and vocabulary.special_ids["bos"] == 881


def test_tokenizers_that_no_gguf_can_say_are_refused(tiny: Path, tmp_path: Path):
    folder = copy_tokenizer(tiny, tmp_path / "other")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1] | {"use_regex": True}
    content["normalizer"] = {"type": "Lowercase"}
    content["added_tokens"][0]["lstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    # Qwen2Tokenizer would put its own rules in place of these.
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ConfigError, match=r"splits text by other rules; it normalises by Lowercase; its tokens '<\|endof"):
        read_vocabulary(folder, 896)
