"""Rows with media, from the file to the batch."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from finetune.config.schema import DataConfig, ModelConfig, SourceConfig
from finetune.data.batch import assign_rows, build_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.loader import describe_leaks, first_conversations, load_data, load_media_processor
from finetune.data.media.processor import MediaProcessor
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.distill.fingerprint import key_of, keys_of
from finetune.models.families import PositionRule
from finetune.system.errors import ConfigError, DataError, MissingExtra
from tests.media_models import sound, video
from tests.media_rows import media_processor, media_tokenizer, png

# Images beside the rows, and their tokens: one for 28 x 28 pixels.
TOKENS = {"a.png": 4, "b.png": 6}
ANSWER = {"role": "assistant", "content": "A square."}
OMNI = "qwen2_5_omni"


def row(content: object = "<image>What is it?", *more: dict, **columns: object) -> dict:
    messages = [{"role": "user", "content": content}, ANSWER, *more]
    return {"messages": messages, **(columns or {"images": ["a.png"]})}


@pytest.fixture(scope="module")
def tokenizers(repo_root) -> dict:
    return {name: media_tokenizer(name, repo_root) for name in ("qwen2_5_vl", OMNI)}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.png").write_bytes(png(56, 56))
    (tmp_path / "b.png").write_bytes(png(84, 56, 9))
    return tmp_path


@pytest.fixture
def prepare(tokenizers, folder):
    def prepare(*rows: dict, file: str = "rows.jsonl", family: str = OMNI, **settings: Any) -> Preparation:
        (folder / file).write_text("".join(json.dumps(each) + "\n" for each in rows))
        objective = settings.pop("objective", "none")
        media = settings.pop("media", media_processor(family))
        cfg = DataConfig(train=[SourceConfig(path=str(folder / file))], **settings)
        return Preparation(cfg, ChatTemplate(tokenizers[family]), objective=objective, media=media)

    return prepare


@pytest.fixture
def load(prepare):
    return lambda *rows, **settings: load_data(prepare(*rows, **settings))


@pytest.fixture
def shown(tokenizers):
    def shown(document: Document, family: str = OMNI) -> str:
        """Return the text of a document after the system turn, with one placeholder for each medium."""
        placed = document.placed
        inside = set() if placed is None else set(placed.tokens()) - set(placed.starts)
        text = tokenizers[family].decode([token for i, token in enumerate(document.ids) if i not in inside])
        return text.partition("<|im_start|>user\n")[2]

    return shown


@pytest.mark.parametrize(
    ("family", "image"),
    [(OMNI, "<|vision_bos|><|IMAGE|><|vision_eos|>"), ("qwen2_5_vl", "<|vision_start|><|image_pad|><|vision_end|>")],
)
def test_an_image_stands_at_its_tag_and_the_batch_knows_its_tokens(load, shown, tokenizers, folder, family, image):
    text, document = load(row("Hello", other=1), row(), family=family).documents
    assert shown(document, family) == f"{image}What is it?<|im_end|>\n<|im_start|>assistant\nA square.<|im_end|>\n"
    assert tokenizers[family].decode(document.labels[document.labels != IGNORE_INDEX]) == "A square.<|im_end|>"
    [item] = document.media
    assert (Path(item.path), item.tokens, item.grid) == (folder / "a.png", 4, (1, 4, 4))
    batch = build_batch([text, document, document])
    pad = document.ids[document.placed.starts[0]]
    assert batch.media == (item, item)
    assert batch.media_tokens.tolist() == np.flatnonzero(batch.input_ids[0] == pad).tolist()
    assert batch.position_ids.shape == (3, batch.tokens)
    assert batch.position_ids[:, : len(text)].tolist() == [list(range(len(text)))] * 3
    assert np.array_equal(
        batch.position_ids[:, len(text) :][:, : len(document)], document.placed.positions(len(document))
    )
    assert build_batch([text]).position_ids.shape == (1, len(text))
    assert not len(build_batch([text]).media_tokens)


def test_images_audio_and_video_of_one_row_keep_their_order(load, shown, folder):
    sound(folder / "s.wav", 1)
    video(folder / "v.mp4", 1)
    content = "<audio>Is it <image>? <video>Or <image>?"
    [document] = load(row(content, images=["b.png", "a.png"], audios=["s.wav"], videos=["v.mp4"])).documents
    vision = "<|vision_bos|>{}<|vision_eos|>"
    image, film = vision.format("<|IMAGE|>"), vision.format("<|VIDEO|>")
    assert shown(document).startswith(f"<|audio_bos|><|AUDIO|><|audio_eos|>Is it {image}? {film}Or {image}?<|im_end|>")
    names = [Path(item.path).name for item in document.media]
    assert names == ["s.wav", "b.png", "v.mp4", "a.png"]
    pads = [document.ids[start] for start in document.placed.starts]
    assert len(set(pads)) == 3 and pads[1] == pads[3]
    assert [item.tokens for item in document.media] == [17, TOKENS["b.png"], (document.ids == pads[2]).sum(), 4]


def test_embedded_files_and_tables_give_the_documents_of_paths(load, folder, tokenizers):
    [plain] = load(row()).documents
    content = (folder / "a.png").read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What is it?"}]
    [embedded] = load(row(parts, other=1), file="embedded.jsonl").documents
    table = {"image": [{"bytes": content, "path": "a.png"}], "question": ["What is it?"], "answer": ["A square."]}
    parquet.write_table(pyarrow.table(table), folder / "t.parquet")
    cfg = DataConfig(train=[SourceConfig(path=str(folder / "t.parquet"))])
    media = media_processor(OMNI)
    [of_table] = load_data(Preparation(cfg, ChatTemplate(tokenizers[OMNI]), media=media)).documents
    for document in (embedded, of_table):
        assert np.array_equal(document.ids, plain.ids) and np.array_equal(document.labels, plain.labels)
        assert document.media_digest == plain.media_digest
        assert Path(document.media[0].path).read_bytes() == content
        assert folder / "cache" in Path(document.media[0].path).parents


def test_a_folder_with_metadata_is_read(load, folder, tokenizers, shown):
    (folder / "shapes").mkdir()
    (folder / "a.png").rename(folder / "shapes/a.png")
    metadata = {"file_name": "a.png", "question": "What is it?", "answer": "A square."}
    (folder / "shapes/metadata.jsonl").write_text(json.dumps(metadata))
    for path, split in (("shapes", None), (".", "shapes"), ("shapes/metadata.jsonl", None)):
        cfg = DataConfig(train=[SourceConfig(path=str(folder / path), split=split)])
        media = media_processor(OMNI)
        [document] = load_data(Preparation(cfg, ChatTemplate(tokenizers[OMNI]), media=media)).documents
        assert shown(document).startswith("<|vision_bos|><|IMAGE|><|vision_eos|>What is it?")


def test_text_rows_of_a_model_that_reads_media_keep_their_tokens(load):
    texts = [row(text, other=1) for text in ("<image>What?", "a <audio> b", "<|IMAGE|><|vision_bos|>")]
    found, alone = load(*texts).documents, load(*texts, media=None).documents
    for document, other in zip(found, alone, strict=True):
        assert document.placed is None and np.array_equal(document.ids, other.ids)


HOSTILE = {
    "missing": (row(images=["missing.png"]), "message 0 (user): image", "missing.png", "does not exist"),
    "no image": (row(images=["rows.jsonl"]), "message 0 (user): image", "rows.jsonl"),
    "a folder": (row(images=["."]), "message 0 (user): image", "folder"),
    "empty": (row(images=["empty.png"]), "message 0 (user): image", "empty"),
    "an address": (row(images=["https://host/a.png"]), "message 0 (user): image", "data.allow_urls"),
    "a broken data URI": (row(images=["data:image/png;base64,%%"]), "message 0 (user): image", "base64"),
    "a tag too many": (row("<image><image>"), "messages[0]: image 2"),
    "a file too many": (row("What?"), "images: file 1 of 1 has no tag <image>"),
    "of the second question": (
        row("Hi", {"role": "user", "content": [{"type": "image", "image": "x.png"}]}, ANSWER, other=1),
        "message 2 (user): image",
    ),
    "of the assistant": (row("<image>", {"role": "assistant", "content": "<image>"}), "messages[2]", "writes none"),
    "text": ({"text": "A caption", "image": "a.png"}, "format text"),
}


@pytest.mark.parametrize(("bad", "words"), [(bad, words) for bad, *words in HOSTILE.values()], ids=HOSTILE)
def test_a_bad_row_is_named_with_its_message_or_skipped(load, folder, bad: dict, words: list[str]):
    (folder / "empty.png").touch()
    good = {"text": "b"} if "text" in bad else row()
    with pytest.raises(DataError) as error:
        load(good, bad)
    assert [word for word in (f"{folder}/rows.jsonl:2", *words) if word not in str(error.value)] == []
    [document] = load(good, bad, on_bad_row="skip", max_bad_share=0.9).documents
    assert document.row == 0


def test_a_model_names_the_kinds_that_it_does_not_read(load, folder):
    sound(folder / "s.wav", 1)
    with pytest.raises(DataError, match=r"rows.jsonl:1: message 0 \(user\): audio .*s\.wav .*Qwen2\.5-VL"):
        load(row("<audio>What?", audios=["s.wav"]), family="qwen2_5_vl")
    with pytest.raises(DataError, match=r"rows.jsonl:1: message 0 \(user\) holds image, and the model reads text only"):
        load(row(), media=None)
    [document] = load(row()).documents
    with pytest.raises(DataError, match=r"input_ids hold <\|IMAGE\|>"):
        load({"input_ids": document.ids.tolist()}, file="tokens.jsonl")


@pytest.mark.parametrize("truncation", ["drop", "left", "right", "split", "error"])
def test_rows_with_media_are_never_cut(load, truncation: str):
    long, cut = row("<image>" + "What? " * 30), row("What? " * 30, other=1)
    limit = len(load(row(), long).documents[0])
    if truncation == "error":
        with pytest.raises(DataError, match="2 rows are longer"):
            load(row(), long, cut, max_length=limit, truncation="error")
        return
    if truncation != "drop":
        with pytest.raises(DataError, match=r"1 rows are longer .* hold media, which are never cut(.|\n)*rows.jsonl:2"):
            load(row(), long, cut, max_length=limit, truncation=truncation)
    data = load(row(), long, cut, max_length=limit, truncation=truncation, on_bad_row="skip")
    assert {document.row for document in data.documents} == ({0} if truncation in ("drop", "right") else {0, 2})
    counts = data.train[0].counts
    assert counts[f"longer than {limit} tokens (left out: media are never cut)"] == 1
    assert counts[f"longer than {limit} tokens ({truncation})"] == 1


def test_the_sides_of_a_pair_have_the_media_of_the_prompt(load, shown):
    pair = {"prompt": "<image>Or <image>?", "chosen": "One", "rejected": "The other one", "images": ["a.png", "b.png"]}
    [document] = load(pair, objective="dpo").documents
    assert [item.tokens for item in document.media] == [4, 6, 4, 6]
    image = "<|vision_bos|><|IMAGE|><|vision_eos|>"
    for side, answer in zip(document.sides, ("One", "The other one"), strict=True):
        assert side is not None and side.placed is not None
        assert shown(side) == f"{image}Or {image}?<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        assert set(side.ids[side.placed.tokens()]) == {side.ids[side.placed.starts[0]]}
    batch = build_batch([document], share_prefixes=True)
    first, second = batch.position_ids.split(list(batch.segment_lengths), dim=1)
    shared = document.sides[0].first_target + 1
    assert first[:, :shared].equal(second[:, :shared]) and first[:, 0].tolist() == [0, 0, 0]
    assert batch.rows == batch.tokens - shared


def test_prompts_of_rewards_have_their_media_and_generation_gets_the_same(load, prepare):
    asked = {"prompt": [{"role": "user", "content": "<image>What is it?"}], "images": ["b.png"]}
    preparation = prepare(asked, objective="reward")
    data = load_data(preparation)
    [document] = data.documents
    [conversation] = first_conversations(data.train[0], preparation, 1)
    prompt = preparation.chat.prompt(conversation.prompt, (), preparation.media)
    assert prompt.media == document.media and not prompt.trained.any()
    assert np.array_equal(prompt.ids, document.ids[: document.first_target + 1])
    assert np.array_equal(prompt.placed.positions(len(prompt.ids)), document.placed.positions(len(prompt.ids)))
    length = len(prompt.ids)
    assert prompt.placed.positions(length + 1)[0, -1] == document.placed.positions(len(document))[0, length]


def test_media_after_the_last_target_are_left_out_where_prefixes_are_shared(load):
    late = row("<image>What?", {"role": "user", "content": "And <image>?"}, images=["a.png", "b.png"])
    [document] = load(late).documents
    whole, shared = build_batch([document]), build_batch([document], share_prefixes=True)
    assert [len(batch.media) for batch in (whole, shared)] == [2, 1]
    assert shared.media_tokens.equal(whole.media_tokens[: TOKENS["a.png"]])
    assert shared.position_ids.equal(whole.position_ids[:, : shared.tokens])
    with pytest.raises(ValueError, match="cut the image"):
        document.cut(slice(0, document.placed.starts[1] + 1))


def test_documents_share_rows_only_with_the_same_media_before(load):
    first = [{"role": "user", "content": "<image>What?"}, ANSWER, {"role": "user", "content": "And <image>?"}, ANSWER]
    same = [{"messages": first, "images": ["a.png", second]} for second in ("a.png", "b.png")]
    equal, other, again = load(*same, same[0]).documents
    rows = assign_rows([equal, other, again])
    assert rows[-len(again) :].tolist() == rows[: len(equal)].tolist()
    assert not set(rows[: len(equal)]) & set(rows[len(equal) : len(equal) + len(other)])
    batch = build_batch([equal, other, again])
    assert [key for key, _ in keys_of(batch)] == [key_of(each) for each in (equal, other, again)]
    assert len({key_of(each) for each in (equal, other, again)}) == 2


def test_duplicates_and_leaks_are_rows_with_the_same_media(load, folder, tokenizers):
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    train = load(row(), row(images=["copy.png"]), row(images=["b.png"]))
    assert len(set(train.train[0].store.hashes)) == 2
    evaluated = load(row(images=["copy.png"]), row("What is it?<image>"), file="eval.jsonl")
    both = replace(train, eval=evaluated.train)
    assert ["1 of its 2 rows are training rows" in line for line in describe_leaks(both)] == [True]


def test_the_cache_follows_the_files_and_the_settings_of_media(prepare, folder):
    def folder_of(**settings: Any) -> Path:
        preparation = prepare(row(), **settings)
        return preparation.store(preparation.cfg.train[0]).folder

    first = folder_of()
    assert folder_of() == first
    assert folder_of(image={"max_pixels": 28 * 28, "min_pixels": 28 * 28}, media=small_images()) != first
    assert "media" not in prepare(row(), media=None).made_from(SourceConfig(path="x"))
    time = (first / "meta.json").stat().st_mtime_ns
    folder_of()
    assert (first / "meta.json").stat().st_mtime_ns == time
    (folder / "a.png").write_bytes(png(84, 84))
    preparation = prepare(row())
    [document] = load_data(preparation).documents
    assert [item.tokens for item in document.media] == [9]
    os.remove(folder / "a.png")
    with pytest.raises(DataError, match="does not exist"):
        load_data(preparation)


def small_images() -> MediaProcessor:
    return media_processor(OMNI, image={"min_pixels": 28 * 28, "max_pixels": 28 * 28})


def test_processes_give_the_rows_of_one_process_and_pass_on_what_is_not_installed(load, folder, monkeypatch):
    rows = [row(f"<image>What {i}?", images=[["a.png", "b.png"][i % 2]]) for i in range(150)]
    alone, shared = load(*rows), load(*rows, workers=2, cache=str(folder / "other"))
    assert alone.digest == shared.digest
    assert [d.placed for d in alone.documents] == [d.placed for d in shared.documents]
    blocked = folder / "blocked/soundfile.py"
    blocked.parent.mkdir()
    blocked.write_text("raise ImportError('no soundfile')")
    monkeypatch.setenv("PYTHONPATH", str(blocked.parent))
    sound(folder / "s.wav", 1)
    with pytest.raises(MissingExtra, match="audio"):
        load(row("<audio>What?", audios=["s.wav"]), workers=1)


def test_a_model_folder_decides_whether_and_how_media_are_read(folder, repo_root):
    def processor(config: dict) -> MediaProcessor | None:
        (folder / "config.json").write_text(json.dumps(config))
        return load_media_processor(ModelConfig(name=str(folder)), DataConfig(image={"max_pixels": 7000}))

    thinker = {"position_id_per_seconds": 13}
    found = processor({"model_type": OMNI, "thinker_config": thinker})
    assert found is not None and found.positions == PositionRule(13, text_follows_time=True)
    assert found.kinds == ("image", "audio", "video") and found.image.max_pixels == 7000
    assert processor({"model_type": "qwen2_5_omni_thinker", **thinker}).positions == found.positions
    vision = processor({"model_type": "qwen2_5_vl", "vision_config": {"tokens_per_second": 2}})
    assert vision.positions == PositionRule(2, text_follows_time=False) and vision.kinds == ("image", "video")
    assert load_media_processor(ModelConfig(name=str(repo_root / "data/tiny-qwen2.5")), DataConfig()) is None
    for wrong in (0, -1, "fast", True, [2]):
        with pytest.raises(ConfigError, match=r"vision_config\.tokens_per_second is not valid"):
            processor({"model_type": "qwen2_5_vl", "vision_config": {"tokens_per_second": wrong}})
