"""Chat: turns, slash commands, the settings of an adapter, and no control characters on the terminal."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetune.cli import main
from finetune.commands import chat
from finetune.commands.chat import Conversation, respond, talk
from finetune.config.command_options import ChatOptions
from finetune.config.compose import load_config, to_yaml
from finetune.config.schema import SourceConfig
from finetune.data.encoded import Encoded
from finetune.data.formats.detection import with_formats
from finetune.data.formats.messages import MediaPart, Message
from finetune.data.formats.parser import RowParser
from finetune.data.sources.paths import resolve_source
from finetune.evaluation import generation, streaming
from finetune.models.adapters import base_config
from finetune.models.adapters.base_config import find_base_config
from finetune.models.fused import FusedDecoderLayer
from finetune.models.load import load_base
from finetune.models.quant.quantize import quantized_layers
from finetune.system.errors import ConfigError, DataError
from finetune.system.resources import packaged

LETTERS = SimpleNamespace(eos_token_id=0, pad_token_id=0, decode=lambda ids, **_: "".join(map(chr, ids)))


class LetterTemplate:
    """A chat template with one token per character; it keeps the messages of each prompt."""

    def __init__(self):
        self.seen: list[list[Message]] = []

    def prompt(self, messages: list[Message], processor=None) -> Encoded:
        self.seen.append(list(messages))
        ids = np.array([ord(c) for m in messages for c in m.content], dtype=np.int32)
        return Encoded(ids, np.zeros(len(ids), dtype=np.float32))

    def stop_ids(self) -> list[int]:
        return [0, 1]


class Scripted:
    """A model that writes a given answer token by token; an exception in the script is raised there."""

    def __init__(self, *script):
        self.script = script
        self.options: dict = {}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Models of a script write it; others generate."""
    generate = streaming.stream_answer

    def stream(model, prompt, put, **options):
        if not isinstance(model, Scripted):
            generate(model, prompt, put, **options)
            return
        model.options = options
        for part in model.script:
            if isinstance(part, BaseException):
                raise part
            for character in part:
                put(ord(character))

    monkeypatch.setattr(streaming, "stream_answer", stream)


def conversation(*script, **options) -> Conversation:
    return Conversation(Scripted(*script), LETTERS, LetterTemplate(), ChatOptions(**options), 64)  # type: ignore[arg-type]


def test_every_turn_sees_the_turns_before_it_and_the_system_message():
    talking = conversation("fine", system="short")
    talking.answer("hi")
    talking.answer("bye")
    roles = [(m.role, m.content) for m in talking.chat.seen[-1]]
    assert roles == [("system", "short"), ("user", "hi"), ("assistant", "fine"), ("user", "bye")]


def test_without_a_system_setting_the_template_gets_none():
    talking = conversation("fine")
    talking.answer("hi")
    assert [m.role for m in talking.chat.seen[0]] == ["user"]


def test_reset_forgets_and_exit_ends(capsys):
    talking = conversation("fine")
    talk(talking, ["hi", "/reset", "again", "/exit", "never"])
    assert [[m.content for m in seen] for seen in talking.chat.seen] == [["hi"], ["again"]]
    assert capsys.readouterr().out == "fine\nfine\n"


def test_a_saved_conversation_is_a_training_row(tmp_path: Path, capsys):
    talking = conversation("fine", system="short")
    talk(talking, [f"/save {tmp_path}/none.jsonl", "hi", "/save", f"/save {tmp_path}/rows.jsonl"])
    row = {
        "messages": [{"role": r, "content": c} for r, c in (("system", "short"), ("user", "hi"), ("assistant", "fine"))]
    }
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [row]
    assert not (tmp_path / "none.jsonl").exists() and capsys.readouterr().err.count("error: /save") == 2


def test_a_line_that_ends_in_a_backslash_continues(monkeypatch):
    typed = iter(["one\\", "two", "", "three"])

    def line(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", line)
    assert list(chat._typed_lines()) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/rest", "/reset"),
        ("/ext", "/exit"),
        ("/help", "/reset"),
        ("/quit", "/exit"),
        ("/zzz", "/help"),
    ],
)
def test_slash_commands_and_their_typos_never_reach_the_model(line: str, shown: str, capsys):
    talking = conversation("fine")
    assert respond(talking, line)
    assert talking.chat.seen == [] and shown in capsys.readouterr().err


def test_system_message_and_temperature_change_in_the_chat(capsys):
    talking = conversation("fine")
    talk(talking, ["/system be: short", "/temperature 0.7", "hi", "/temperature 0", "bye", "/system"])
    assert [m.content for m in talking.chat.seen[-1]] == ["be: short", "hi", "fine", "bye"]
    assert (talking.options.temperature, talking.model.options["temperature"]) == (0.0, 0.0)
    assert "be: short" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", "warm", "[1]"])
def test_a_wrong_temperature_is_an_error_and_the_chat_goes_on(value: str, capsys):
    talking = conversation("fine", temperature=0.5)
    talk(talking, [f"/temperature {value}", "hi"])
    captured = capsys.readouterr()
    assert talking.options.temperature == 0.5 and value in captured.err and captured.out == "fine\n"


@pytest.mark.parametrize("line", ["/usr/bin/env: what is it?", "a/b", "exit", "reset /reset"])
def test_ordinary_text_with_slashes_reaches_the_model(line: str):
    talking = conversation("fine")
    assert respond(talking, line)
    assert [m.content for m in talking.chat.seen[0]] == [line]


def test_the_model_cannot_send_control_characters_to_the_terminal(capsys):
    attack = "\x1b]0;owned\x07\x1b[2Jhello\r\x9b31m\x7f\ttab\nline"
    talking = conversation(attack)
    talking.answer("hi")
    out = capsys.readouterr().out
    assert not [c for c in out if (ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160]
    assert "hello" in out and "\ttab\nline" in out
    assert talking.turns[-1].content == attack


def test_ctrl_c_keeps_the_start_of_an_answer_at_a_terminal_and_ends_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    talking = conversation("half ", "of ", KeyboardInterrupt())
    talking.answer("hi")
    assert talking.turns[-1].content.startswith("half")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    with pytest.raises(KeyboardInterrupt):
        talking.answer("hi")


def test_an_answer_stopped_before_its_first_word_leaves_no_turns(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    talking = conversation(KeyboardInterrupt())
    talking.answer("hi")
    assert talking.turns == []


def test_a_turn_beyond_the_context_is_refused_and_the_conversation_stays(capsys):
    talking = conversation("fine")
    talking.answer("hi")
    before = list(talking.turns)
    with pytest.raises(DataError, match="/reset"):
        talking.answer("x" * 100)
    talk(talking, ["x" * 100, "ok"])
    assert talking.turns[: len(before)] == before and len(talking.turns) == len(before) + 2
    assert "error:" in capsys.readouterr().err


def test_answers_stay_inside_the_context_and_stop_at_the_end_of_text_and_of_turn():
    talking = conversation("fine", max_new_tokens=500)
    talking.answer("x" * 60)
    assert talking.model.options == {"max_new_tokens": 4, "stop_ids": [0, 1], "temperature": 0}


def test_a_temperature_above_zero_samples():
    talking = conversation("fine", temperature=0.7)
    talking.answer("hi")
    assert talking.model.options["temperature"] == 0.7


def test_every_wrong_setting_is_named_at_once(capsys):
    assert main(["chat", "model=x", "max_new_tokens=many", "temperature=-1"]) == 2
    err = capsys.readouterr().err
    assert "max_new_tokens" in err and '"many"' in err and "temperature" in err and "-1" in err


def test_a_model_an_adapter_or_a_config_is_needed(capsys):
    assert main(["chat", "temperature=1"]) == 2
    err = capsys.readouterr().err
    assert "adapter=" in err and "model=" in err and "config=" in err


@pytest.mark.parametrize(
    ("words", "model", "file"),
    [(["model=folder"], "folder", None), (["config=lora.yaml", "model=x"], None, "lora.yaml")],
)
def test_model_is_a_folder_without_a_config_and_a_group_with_one(monkeypatch, words, model, file):
    seen = []
    monkeypatch.setattr(
        base_config, "find_base_config", lambda *found: seen.append(found[1:]) or load_config("quickstart.yaml")
    )
    monkeypatch.setattr(chat, "load_conversation", lambda *_: conversation("fine"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["chat", *words, "quant.type=none"]) == 0
    overrides = ("quant.type=none",) if file is None else (words[1], "quant.type=none")
    assert seen == [(file, model, None, overrides)]


def test_a_bare_adapter_brings_its_base_and_revision_and_the_default_quantization(tmp_path: Path):
    base = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-0.5B", "revision": "abc"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    config = find_base_config("finetune chat", None, None, tmp_path, ["quant.double=false"])
    assert (config.model.name, config.model.revision) == ("Qwen/Qwen2.5-0.5B", "abc")
    assert (config.quant.type, config.quant.double) == ("nf4", False)
    assert find_base_config("finetune chat", None, "elsewhere", tmp_path, []).model.name == "elsewhere"


@pytest.mark.parametrize("where", [".", "checkpoint-3"])
def test_an_adapter_of_a_run_is_loaded_as_it_was_trained(tmp_path: Path, where: str):
    words = ["model.name=my/base", "quant.type=int8", "quant.double=false", "data.train=a.jsonl"]
    trained = load_config("lora.yaml", words)
    (tmp_path / "config.yaml").write_text(to_yaml(trained))
    folder = tmp_path / where
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other"}))
    config = find_base_config("finetune chat", None, None, folder, [])
    assert (config.model.name, config.quant.type) == ("my/base", "int8")
    assert find_base_config("finetune chat", None, "moved/base", folder, []).model.name == "moved/base"


@pytest.mark.parametrize("content", [None, "{}", "[]", "no json"])
def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match="adapter"):
        find_base_config("finetune chat", None, None, tmp_path, [])


def test_a_pipe_gives_one_answer_per_line_and_nothing_else(monkeypatch, capsys):
    monkeypatch.setattr(chat, "load_conversation", lambda *_: conversation("fine"))
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\n\xff two\n/exit\nthree\n"), encoding="utf-8")
    )
    assert main(["chat", "config=lora.yaml"]) == 0
    assert capsys.readouterr().out == "fine\nfine\n"


@pytest.mark.parametrize(
    ("free", "settings", "kept"),
    [
        (2**34, [], True),
        (2**20, [], False),
        (None, [], False),
        (2**34, ["train.kernels=peft"], False),
    ],
)
def test_weights_are_dequantized_once_if_they_fit_into_memory(monkeypatch, free, settings, kept):
    """And the answers are those of weights dequantized for each token."""
    monkeypatch.setattr(generation, "available_memory", lambda: free)
    config = load_config(str(packaged("configs") / "quickstart.yaml"), settings)
    talking = chat.load_conversation(config, None, ChatOptions(max_new_tokens=8))
    layers = [module for _, module in quantized_layers(talking.model, "nf4")]
    assert layers and {hasattr(layer, "resident_weight") for layer in layers} == {kept}
    assert {isinstance(module, FusedDecoderLayer) for module in talking.model.model.layers} == {
        "train.kernels=peft" not in settings
    }
    talking.answer("hi")
    expected = load_base(config.model, config.quant).generate(
        torch.tensor([talking.chat.prompt_ids([Message("user", "hi")])]),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=talking.chat.stop_ids(),
        pad_token_id=0,
    )
    assert talking.turns[-1].content in talking.tokenizer.decode(expected[0], skip_special_tokens=True)


@pytest.fixture(scope="module")
def reader() -> Conversation:
    """The embedded model that reads pictures and sounds."""
    base = str(packaged("data") / "tiny-qwen2.5-omni")
    config = load_config("quickstart.yaml", [f"model.name={base}", "quant.type=none", "model.dtype=float32"])
    return chat.load_conversation(config, None, ChatOptions(max_new_tokens=12))


@pytest.fixture
def fresh(reader: Conversation) -> Conversation:
    reader.turns.clear()
    reader.files.clear()
    return reader


SAMPLE = packaged("data") / "sample"


def parsed(rows: Path) -> list[Any]:
    """Return the conversations of a file of rows."""
    source = SourceConfig(path=str(rows))
    batches = with_formats(source, resolve_source(source).batches(None))
    return [example for batch in batches for _, example in RowParser(source).rows(batch)]


def test_what_chat_serves_is_what_training_measures(fresh: Conversation, capsys):
    """A row's files and text, given in the chat, get the answer that `answer_rows` gives to the row."""
    example = parsed(SAMPLE / "both-heldout.jsonl")[0]
    [expected] = generation.answer_rows(
        fresh.model, fresh.tokenizer, fresh.chat, [example], max_new_tokens=12, batch_size=1
    )
    question = example.messages[0]
    talk(fresh, [*(f"/{part.kind} {part.reference}" for part in question.media), question.content])
    assert {part.kind for part in question.media} == {"image", "audio"}
    assert fresh.turns[1].content == expected.given and capsys.readouterr().out == f"{expected.given}\n"


def test_a_conversation_with_files_is_saved_as_a_row_that_training_reads(fresh: Conversation, tmp_path: Path, capsys):
    picture, sound = next(SAMPLE.glob("pictures/*")), next(SAMPLE.glob("sounds/*"))
    file = tmp_path / "rows.jsonl"
    lines = [f"/image {picture}", f"/audio {sound}", "What?", f"/image {picture}", "/send", f"/save {file}"]
    talk(fresh, lines)
    [row] = map(json.loads, file.read_text().splitlines())
    assert [turn["content"] for turn in row["messages"] if turn["role"] == "user"] == ["<image><audio>What?", "<image>"]
    assert (row["images"], row["audios"]) == ([str(picture), str(picture)], [str(sound)])
    [read] = parsed(file)
    assert list(read.messages) == fresh.messages()


def test_tags_that_a_user_types_stay_text_in_a_saved_row(fresh: Conversation, tmp_path: Path):
    fresh.turns[:] = [
        Message("user", "Is <image> a tag?", media=(MediaPart("image", str(next(SAMPLE.glob("pictures/*"))), 0),)),
        Message("assistant", "<image> is one."),
    ]
    respond(fresh, f"/save {tmp_path / 'rows.jsonl'}")
    [read] = parsed(tmp_path / "rows.jsonl")
    assert list(read.messages) == fresh.messages()


@pytest.mark.parametrize("name", ["missing.png", "broken.png", "", "folder"])
def test_a_file_that_cannot_be_read_is_an_error_and_the_chat_goes_on(fresh, tmp_path, monkeypatch, capsys, name):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    talk(fresh, [f"/image {name}".strip(), "/send", "hi"])
    assert capsys.readouterr().err.count("error: ") == 2
    assert fresh.files == [] and not any(turn.media for turn in fresh.turns)


def test_a_model_without_towers_names_the_kinds_it_reads(fresh: Conversation, capsys):
    picture = next(SAMPLE.glob("pictures/*"))
    talking = conversation("fine")
    talk(talking, [f"/image {picture}", "hi"])
    err = capsys.readouterr().err
    assert "text only" in err and [m.content for m in talking.chat.seen[0]] == ["hi"]
    fresh.processor, whole = replace(fresh.processor, kinds=("audio",)), fresh.processor
    talk(fresh, [f"/image {picture}"])
    fresh.processor = whole
    assert "text, audio" in capsys.readouterr().err and not fresh.files


def test_reset_forgets_files_too_and_the_prompt_shows_them(fresh: Conversation, monkeypatch):
    picture, prompts = next(SAMPLE.glob("pictures/*")), []
    typed = iter([f"/image {picture}", "/reset", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or next(typed))
    talk(fresh, chat._typed_lines(fresh.files))
    assert prompts == ["> ", "<image> > ", "> "]
