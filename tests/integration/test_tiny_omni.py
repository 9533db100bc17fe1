"""The embedded base that sees and hears: what it is, that it knows its scenes, and nothing of the sample's skills."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import wave
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

DATA = Path(__file__).resolve().parents[2] / "data"
BASE, SAMPLE = DATA / "tiny-qwen2.5-omni", DATA / "sample"
SCRIPTS = ("generate", "card", "pretrain", "pictures", "sounds", "scenes", "media_rows", "card_omni", "pretrain_omni")
SKILLS = ("vision", "audio", "both")


@pytest.fixture(scope="module")
def pretrain() -> ModuleType:
    """The scripts of data/, which are no part of the package; they import one another by name."""
    for name in SCRIPTS:
        spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules["pretrain_omni"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def bf16() -> PreTrainedModel:
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(BASE)


@pytest.fixture(scope="module")
def nf4(pretrain: ModuleType) -> PreTrainedModel:
    return pretrain.load_nf4(BASE)


def test_it_is_a_small_thinker_with_both_towers_and_a_tied_head(bf16: PreTrainedModel) -> None:
    assert {p.dtype for p in bf16.parameters()} == {torch.bfloat16}
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 12_000_000
    assert bf16.lm_head.weight is bf16.model.language_model.embed_tokens.weight
    assert bf16.config.model_type == "qwen2_5_omni_thinker"
    assert bf16.config.text_config.rope_parameters["mrope_section"] == [8, 12, 12]


def test_every_linear_of_the_language_model_fills_whole_nf4_blocks(bf16: PreTrainedModel) -> None:
    linears = [m for m in bf16.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7 * bf16.config.text_config.num_hidden_layers
    assert all(m.in_features % 64 == 0 and m.out_features % 64 == 0 for m in linears)


def test_it_has_the_tokens_of_the_text_base_then_those_of_media(tokenizer: PreTrainedTokenizerFast) -> None:
    text = AutoTokenizer.from_pretrained(DATA / "tiny-qwen2.5")
    media = tokenizer.get_vocab().keys() - text.get_vocab().keys()
    assert text.get_vocab().items() <= tokenizer.get_vocab().items()
    assert media == {f"<|{name}|>" for name in "vision_bos vision_eos audio_bos audio_eos IMAGE AUDIO VIDEO".split()}
    assert media <= set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())


def test_the_template_writes_parts_as_qwen2_5_omni_does(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": kind} for kind in ("image", "audio", "video")] + [{"type": "text", "text": "Hi"}]
    written = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert written.endswith(
        "<|im_start|>user\n<|vision_bos|><|IMAGE|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
        "<|vision_bos|><|VIDEO|><|vision_eos|>Hi<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == (
        AutoTokenizer.from_pretrained(DATA / "tiny-qwen2.5").apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False
        )
    )


def test_the_config_names_the_tokens_of_media(bf16: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    config, id_of = bf16.config, tokenizer.convert_tokens_to_ids
    assert (config.image_token_id, config.audio_token_id) == (id_of("<|IMAGE|>"), id_of("<|AUDIO|>"))
    assert config.vision_start_token_id == id_of("<|vision_bos|>")
    assert config.audio_start_token_id == id_of("<|audio_bos|>")


def test_the_saved_settings_are_those_of_the_processors(pretrain: ModuleType) -> None:
    saved = json.loads((BASE / "preprocessor_config.json").read_text(encoding="utf-8"))
    processor = pretrain.Processor()
    for part in (json.loads(each.to_json_string()) for each in (processor.pixels, processor.mel)):
        shared = saved.keys() & part.keys() - {"processor_class", "return_attention_mask"}
        assert len(shared) >= 5 and {key: saved[key] for key in shared} == {key: part[key] for key in shared}


def test_pretraining_rows_are_what_the_chat_template_writes(
    pretrain: ModuleType, tokenizer: PreTrainedTokenizerFast
) -> None:
    """With a placeholder for each embedding in the place of one."""
    rng = Random(3)
    conversations = [pretrain.conversation(rng) for _ in range(60)]
    for conversation, row in zip(
        conversations, pretrain.encode_media(tokenizer, pretrain.Processor(), conversations), strict=True
    ):
        counts = iter([media.tokens for media in row.media])
        placeholders = tokenizer.convert_tokens_to_ids(["<|IMAGE|>", "<|AUDIO|>"])
        written = tokenizer.apply_chat_template(list(map(in_parts, conversation.messages)))["input_ids"]
        assert row.ids == [token for i in written for token in [i] * (next(counts) if i in placeholders else 1)]


def in_parts(message: dict[str, str]) -> dict:
    parts = [
        {"type": piece[1:-1]} if piece in ("<image>", "<audio>") else {"type": "text", "text": piece}
        for piece in re.split("(<image>|<audio>)", message["content"])
    ]
    return message | {"content": parts}


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_it_knows_what_its_card_says(
    pretrain: ModuleType, tokenizer: PreTrainedTokenizerFast, weights: str, request: pytest.FixtureRequest
) -> None:
    """Over 40 scenes of each kind: a share of 0.736 over 320 scenes has a standard error of 2.5 points."""
    scores = pretrain.accuracies(request.getfixturevalue(weights), tokenizer, 11, 40)
    column = {"bf16": 2, "nf4": 3}[weights]
    lines = (line.split("|") for line in (BASE / "README.md").read_text(encoding="utf-8").splitlines())
    claimed = {
        line[1].strip(): float(line[column].strip().rstrip("%")) / 100
        for line in lines
        if len(line) == 5 and "%" in line[2]
    }
    assert claimed.keys() == scores.keys() | {"mean"}
    assert abs(sum(scores.values()) / len(scores) - claimed["mean"]) <= 3 * 0.025, scores


def heldout(pretrain: ModuleType, skill: str) -> list:
    lines = (SAMPLE / f"{skill}-heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        pretrain.Conversation(row["messages"], tuple(map(read, [*row.get("images", []), *row.get("audios", [])])))
        for row in rows
    ]


def read(name: str) -> np.ndarray:
    if name.endswith(".png"):
        return np.array(Image.open(SAMPLE / name))
    with wave.open(str(SAMPLE / name)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


@pytest.mark.parametrize("skill", SKILLS)
def test_it_lacks_the_skills_of_the_sample_data(
    pretrain: ModuleType, tokenizer: PreTrainedTokenizerFast, nf4: PreTrainedModel, skill: str
) -> None:
    assert pretrain.exact_match(nf4, tokenizer, heldout(pretrain, skill)) <= 0.10


def test_every_token_of_the_sample_answers_was_an_answer_in_pretraining(
    pretrain: ModuleType, tokenizer: PreTrainedTokenizerFast
) -> None:
    """An adapter of attention can't emit a token that the tied head never learned to emit."""
    rng = Random(0)
    learned = answer_tokens(pretrain, tokenizer, [pretrain.conversation(rng) for _ in range(500)])
    for skill in SKILLS:
        assert answer_tokens(pretrain, tokenizer, heldout(pretrain, skill)) <= learned


def answer_tokens(pretrain: ModuleType, tokenizer: PreTrainedTokenizerFast, rows: list) -> set[int]:
    encoded = pretrain.encode_media(tokenizer, pretrain.Processor(), rows)
    return {token for row in encoded for token, answer in zip(row.ids, row.answer, strict=True) if answer}
