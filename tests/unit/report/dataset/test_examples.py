"""Examples show every token once, with targets marked; no text of a row can imitate a mark."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig
from finetune.data.encoded import Encoded
from finetune.data.formats.messages import Conversation, Message
from finetune.data.loader import load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.report.dataset.examples import Decoder, ShownRow, Side, Span, marked, shown_rows
from finetune.report.dataset.files import write_page
from finetune.report.dataset.statistics import MediaFigures, build_report
from finetune.report.dataset.terminal import print_rows
from finetune.system.resources import packaged
from tests.media_rows import media_processor, media_tokenizer, png


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5")


@pytest.fixture(scope="module")
def chat(tokenizer) -> ChatTemplate:
    return ChatTemplate(tokenizer)


@pytest.fixture(scope="module")
def decoder(tokenizer) -> Decoder:
    return Decoder.of(tokenizer)


def encode(chat: ChatTemplate, *turns: str, weight: float = 1.0) -> Encoded:
    """Encode alternating turns of user and assistant."""
    roles = ("user", "assistant") * len(turns)
    messages = (Message(role, text, weight=weight) for role, text in zip(roles, turns, strict=False))
    [encoded] = chat.encode([Conversation(tuple(messages))])
    assert isinstance(encoded, Encoded)
    return encoded


TEXT = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=30) | st.sampled_from(
    ["<|im_end|>", "a\n\n", "你好 <|im_start|>system\n", "⟦x⟧", "é́", "👩‍👩‍👧"]
)


@given(question=TEXT, answer=TEXT)
def test_spans_hold_the_whole_row_and_weight_the_answer(tokenizer, chat, decoder, question, answer):
    encoded = encode(chat, question, answer)
    spans = decoder.spans(encoded)
    assert "".join(span.text for span in spans) == tokenizer.decode(encoded.ids)
    trained = "".join(span.text for span in spans if span.weight)
    # A token that holds the header's newline and the answer's beginning is no target.
    assert trained.endswith("<|im_end|>") and f"\n{answer}<|im_end|>".endswith(trained)
    assert sum(span.kind == "control" for span in spans) == sum(int(i) in decoder.control for i in encoded.ids)


def test_control_tokens_differ_from_text_that_looks_like_them(chat, decoder):
    spans = decoder.spans(encode(chat, "x <|im_end|> y", "ok"))
    assert [s.text for s in spans if s.kind == "spelled"] == ["<|im_end|>"]
    assert marked(spans).count("\\<|im_end|>") == 1
    assert marked(spans).endswith("⟦ok<|im_end|>⟧\n")


def test_marks_show_weights_and_cannot_be_imitated(chat, decoder):
    text = marked(decoder.spans(encode(chat, "⟦fake⟧\x1b[31m", "half", weight=0.5)))
    assert "\\⟦fake\\⟧␛[31m" in text and text.endswith("⟦×0.5 half<|im_end|>⟧\n")
    assert text.count("⟦") - text.count("\\⟦") == 1 == text.count("⟧") - text.count("\\⟧")
    assert "\x1b" not in text


def test_neighboring_targets_of_different_weight_are_marked_separately():
    spans = [Span("a", 1.0, "text"), Span("b", 2.0, "text"), Span("c", 2.0, "control"), Span("d", 0.0, "text")]
    assert marked(spans) == "⟦a⟧⟦×2 bc⟧d"


def write(file: Path, answers: list[str]) -> SourceConfig:
    rows = [{"prompt": f"question {i}", "completion": answer} for i, answer in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(file))


def test_examples_are_spread_over_the_sources_and_always_the_same(tmp_path, chat, decoder):
    cfg = DataConfig(train=[write(tmp_path / "a.jsonl", ["yes"] * 5), write(tmp_path / "b.jsonl", ["no"] * 4)])
    documents = load_data(Preparation(cfg, chat)).documents
    rows = shown_rows(["a", "b"], documents, decoder, 3)
    assert [row.place for row in rows] == [f"{tmp_path}/{where}" for where in ("a.jsonl:1", "a.jsonl:5", "b.jsonl:4")]
    assert [row.source for row in rows] == ["a", "a", "b"]
    assert rows == shown_rows(["a", "b"], documents, decoder, 3)
    assert len(shown_rows(["a", "b"], documents, decoder, 100)) == 9
    for row, document in zip(rows, (documents[0], documents[4], documents[8]), strict=True):
        assert (row.tokens, row.targets, row.cut_from) == (len(document), document.target_tokens, 0)


@pytest.mark.parametrize("truncation", ["left", "right", "split"])
def test_a_cut_row_is_shown_as_cut_and_its_first_token_is_no_target(tmp_path, chat, decoder, truncation):
    cfg = DataConfig(train=[write(tmp_path / "a.jsonl", ["word " * 200])], max_length=40, truncation=truncation)
    documents = load_data(Preparation(cfg, chat)).documents
    rows = shown_rows(["a"], documents, decoder, 100)
    assert len(rows) == len(documents) > 0
    for row, document in zip(rows, documents, strict=True):
        assert (row.tokens, row.targets) == (len(document), document.target_tokens)
        assert row.cut_from == documents.stores[0].lengths[0] > 40
        assert not row.sides[0].spans[0].weight


def printed(rows: list[ShownRow], color_system: str | None) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, color_system=color_system, force_terminal=color_system is not None, markup=False, soft_wrap=True
    )
    print_rows(console, rows)
    return stream.getvalue()


def test_colors_and_marks_show_the_same_words(chat, decoder):
    encoded = encode(chat, "[red]q[/red] <|im_end|>", "an answer " * 30)
    side = Side("", len(encoded.ids), int(np.count_nonzero(encoded.weights)), decoder.spans(encoded))
    row = ShownRow("rows", "rows.jsonl:1", 99, (side,))
    plain, colored = printed([row], None), printed([row], "truecolor")
    assert "\x1b" not in plain and "an answer " * 30 in plain and "[red]q[/red]" in plain
    assert f"rows.jsonl:1 · {row.tokens} tokens (of 99), {row.targets} targets" in plain
    assert "\x1b[32man answer" in colored and "⟦" not in colored
    assert "\x1b[1;31m\\<|im_end|>" in colored


def test_a_file_is_shown_once_with_its_name_and_thumbnail(tmp_path: Path, repo_root: Path):
    tokenizer, processor = media_tokenizer("qwen2_5_vl", repo_root), media_processor("qwen2_5_vl")
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(56, 84))
    row = {"prompt": "<image>⟨image x⟩ or <image>?", "completion": "One.", "images": ["a.png", "b.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    chat, cfg = ChatTemplate(tokenizer), DataConfig(train=[SourceConfig(path=str(tmp_path / "rows.jsonl"))])
    run = RunConfig(model=ModelConfig(name="base"), data=cfg)
    loaded = load_data(Preparation(cfg, chat, media=processor))
    [shown] = shown_rows(["a"], loaded.documents, Decoder.of(tokenizer), 9)
    files = [span for span in shown.sides[0].spans if span.kind == "media"]
    assert [span.text for span in files] == ["image a.png, 6 tokens", "image b.png, 6 tokens"]
    assert all(span.picture.startswith("data:image/jpeg;base64,") and not span.weight for span in files)
    text = printed([shown], None)
    assert r"<|vision_start|>⟨image a.png, 6 tokens⟩<|vision_end|>\⟨image x\⟩ or <|vision_start|>⟨image b.png" in text
    assert "<|image_pad|>" not in text and "⟦One.<|im_end|>⟧" in text
    report, page = build_report(loaded, run, chat), io.StringIO()
    assert report.training.media == (MediaFigures("image", files=2, tokens=12, most=6),)
    write_page(page, report, [], [shown])
    assert "2 × image, 12 tokens, at most 6 per file" in page.getvalue()
    assert page.getvalue().count('<img src="data:image/jpeg;base64,') == 2
