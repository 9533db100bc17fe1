"""The sample rows with pictures and sounds: what they hold, and that data/scenes.py writes exactly these."""

from __future__ import annotations

import importlib.util
import json
import sys
import wave
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
FILES = ("vision", "vision-heldout", "audio", "audio-heldout", "both", "both-heldout")
COLUMNS = {"<image>": "images", "<audio>": "audios"}


@pytest.fixture(scope="module")
def scenes() -> ModuleType:
    """The scripts of data/, which are no part of the package; they import one another by name."""
    for name in ("generate", "pictures", "sounds", "scenes"):
        spec = importlib.util.spec_from_file_location(name, SAMPLE.parent / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules["scenes"]


def rows(name: str, folder: Path = SAMPLE) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def samples(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)


def test_the_generator_writes_the_committed_rows_pictures_and_sounds(scenes: ModuleType, tmp_path: Path) -> None:
    """Pictures by their pixels, because versions of zlib compress differently."""
    scenes.write_sample(tmp_path)
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (SAMPLE / f"{name}.jsonl").read_bytes()
    for folder in ("pictures", "sounds"):
        assert {f.name for f in (tmp_path / folder).iterdir()} == {f.name for f in (SAMPLE / folder).iterdir()}
    for path in (tmp_path / "pictures").iterdir():
        assert (np.array(Image.open(path)) == np.array(Image.open(SAMPLE / "pictures" / path.name))).all()
    for path in (tmp_path / "sounds").iterdir():
        ours, theirs = samples(path), samples(SAMPLE / "sounds" / path.name)
        assert ours.shape == theirs.shape and abs(ours - theirs).max() <= 1, "libraries round a sine differently"


def test_the_media_are_small() -> None:
    assert sum(f.stat().st_size for kind in ("pictures", "sounds") for f in (SAMPLE / kind).iterdir()) <= 6_000_000


def test_no_picture_and_no_sound_of_a_held_out_row_is_in_a_training_row() -> None:
    for column in COLUMNS.values():
        train, heldout = (
            {file for name in names for row in rows(name) for file in row.get(column, [])}
            for names in (FILES[::2], FILES[1::2])
        )
        assert train and heldout and not train & heldout


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_bare_media_and_a_record(name: str) -> None:
    for row in rows(name):
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"] == "".join(tag for tag, column in COLUMNS.items() if column in row)
        for column in COLUMNS.values():
            assert all((SAMPLE / file).is_file() for file in row.get(column, []))
            assert len(row.get(column, [None])) == 1
        assert len(json.loads(assistant["content"])) >= 2


def test_answers_differ_so_that_the_media_must_be_read() -> None:
    """A row's answer is right for few other rows: no guess reaches 30 %."""
    for name in FILES:
        answers = [row["messages"][1]["content"] for row in rows(name)]
        assert max(map(answers.count, answers)) <= 0.05 * len(answers)


def test_pretraining_answers_bare_media_with_captions_alone(scenes: ModuleType) -> None:
    """Otherwise the base would know the skill that the sample data teach."""
    rng = Random(7)
    for conversation in (scenes.conversation(rng) for _ in range(2000)):
        for user, assistant in zip(conversation.messages[::2], conversation.messages[1::2], strict=False):
            if user["content"] in ("<image>", "<audio>", "<image><audio>", "<audio><image>"):
                assert not assistant["content"].startswith("{")


def test_conversations_are_a_pure_function_of_the_seed(scenes: ModuleType) -> None:
    first, again, other = ([scenes.conversation(Random(seed)) for _ in range(10)] for seed in (1, 1, 2))
    assert [c.messages for c in first] == [c.messages for c in again] != [c.messages for c in other]
    for one, same in zip(first, again, strict=True):
        assert len(one.media) == len(same.media)
        assert all((a == b).all() for a, b in zip(one.media, same.media, strict=True))


def test_each_media_of_a_conversation_has_its_tag(scenes: ModuleType) -> None:
    rng = Random(5)
    for conversation in (scenes.conversation(rng) for _ in range(300)):
        text = "".join(message["content"] for message in conversation.messages)
        assert text.count("<image>") == sum(media.ndim == 3 for media in conversation.media)
        assert text.count("<audio>") == sum(media.ndim == 1 for media in conversation.media)
