"""Rows with media, from the file to the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.batch import build_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.loader import load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from tests.media_rows import media_processor, media_tokenizer, png

ASKED = {"role": "user", "content": "<image>What is it?"}
ANSWER = {"role": "assistant", "content": "A square."}
ROW = {"messages": [ASKED, ANSWER], "images": ["a.png"]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(repo_root):
    return media_tokenizer("qwen2_5_vl", repo_root)


@pytest.fixture
def load(tokenizer, tmp_path):
    """Load rows beside a.png (56 x 56 pixels, 4 tokens) and b.png (84 x 56, 6 tokens)."""
    (tmp_path / "a.png").write_bytes(png(56, 56))
    (tmp_path / "b.png").write_bytes(png(84, 56, 9))

    def load(*rows: dict, file: str = "rows.jsonl", source: dict | None = None, objective="none", **settings):
        path = tmp_path / file
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = DataConfig(train=[SourceConfig(path=str(path), **(source or {}))], **settings)
        return load_data(
            Preparation(cfg, ChatTemplate(tokenizer), objective=objective, media=media_processor("qwen2_5_vl"))
        )

    return load


def text_of(document: Document, tokenizer) -> str:
    return tokenizer.decode(document.ids)


def test_an_image_stands_where_its_tag_is_and_its_tokens_are_no_targets(load, tokenizer, tmp_path):
    [document] = load(ROW).documents
    assert [Path(item.path) for item in document.media] == [tmp_path / "a.png"]
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    text = text_of(document, tokenizer)
    assert f"<|im_start|>user\n{image}What is it?<|im_end|>" in text
    assert tokenizer.decode(document.labels[document.labels != IGNORE_INDEX]) == "A square.<|im_end|>"
    batch = build_batch([document, document])
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert batch.media == document.media * 2
    assert batch.media_tokens.tolist() == (batch.input_ids[0] == pad).nonzero().flatten().tolist()
    assert batch.position_ids.shape == (3, len(document) * 2)
