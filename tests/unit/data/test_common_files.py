"""Files as users and other tools write them: read in their only meaning, or refused with the words that mend them."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from finetune.config.schema import DataConfig, ModelConfig
from finetune.data.loader import LoadedData, load_chat_template, load_data
from finetune.data.tokens.prepare import Preparation
from finetune.models.tokenizer import load_tokenizer
from finetune.system.console import log_once
from finetune.system.errors import DataError
from finetune.system.resources import packaged

# Writes tools and their calls, which the template of the tiny base does not.
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"
XY = {"instruction": "x", "output": "y"}
CHAT = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
FLAGS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]
FLAGS += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "loss": True}]
THOUGHT = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "y", "reasoning_content": "hm"}]}
OBJECT = {"instruction": "2+2", "input": {"a": 1}, "output": {"b": [2]}}
GREETING = {"conversations": [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Hi"}]}
GREETING["conversations"] += [{"from": "gpt", "value": "Yes?"}]
SYSTEM_LATER = {"messages": [*CHAT["messages"], {"role": "system", "content": "s"}, *CHAT["messages"]]}


def tools(arguments: Any, answer: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "1", "content": answer}, {"role": "assistant", "content": "36"}]
    return {"tools": [{"name": "now", "parameters": {"type": "object"}}], "messages": turns}


def lines(*rows: Any) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


class Case(NamedTuple):
    """trained: the targets of each row. notes: counted by the log, without rows of other reasons. said: in the log."""

    name: str
    content: str | bytes
    format: str
    trained: tuple[str, ...]
    said: str = ""
    settings: dict[str, Any] | None = None
    notes: tuple[int, ...] = ()


def read(name: str, content: str | bytes, trained: str = f"y{END}", said: str = "", **more: Any) -> Case:
    """Build the case of a file with two alpaca rows, if nothing else is given."""
    format_name, rows = more.pop("format", "alpaca"), more.pop("rows", 2)
    return Case(name, content, format_name, (trained,) * rows, said, **more)


COLUMNS = [
    ({"instruction": "x", "context": "", "response": "y", "category": "open"}, "alpaca", "input: context"),
    ({"instruction": "x", "response": "y"}, "alpaca", "output: response"),
    ({"prompt": "x", "response": "y"}, "prompt_completion", "completion: response"),
    ({"question": "x", "answer": "y"}, "prompt_completion", "prompt: question, completion: answer"),
    ({"input": "x", "output": "y"}, "prompt_completion", "prompt: input, completion: output"),
    ({"Instruction": "x", "Input": "", "Response": "y"}, "alpaca", "instruction: Instruction"),
    ({" instruction": "x", "output ": "y"}, "alpaca", 'instruction: " instruction"'),
]
MARK = codecs.BOM_UTF8.decode()
READ = [
    *(read("columns.jsonl", lines(row, row), said=said, format=name) for row, name, said in COLUMNS),
    read("data-key.json", json.dumps({"data": [XY, XY]}), said="'data'"),
    read("split.json", json.dumps({"train": [XY, XY], "test": [XY]}), said="'train'"),
    read("test.json", json.dumps({"train": [XY], "test": [XY, XY]}), said="'test'", settings={"split": "test"}),
    read("array.jsonl", json.dumps([XY, XY], indent=1), said="one list"),
    read("pretty.jsonl", "\n".join([json.dumps(XY, indent=1)] * 2), said="several lines"),
    read("mark.jsonl", f"{MARK}{lines(XY)}{MARK}{lines(XY)}{MARK}"),
    read("cr.jsonl", lines(XY, XY).replace("\n", "\r"), said="carriage returns"),
    read("semicolons.csv", "instruction;output\r\nx;y\r\nx, z;y\r\n", said="semicolons"),
    read("utf16.csv", "instruction,output\r\nx,y\r\nx,y\r\n".encode("utf-16"), said="UTF-16"),
    read("repr.csv", f'id,messages\r\n0,"{CHAT["messages"]}"\r\n1,"{CHAT["messages"]}"\r\n', format="messages"),
    read("human.jsonl", lines(CHAT, json.loads(json.dumps(CHAT).replace("user", "Human"))), format="messages"),
    read("ai.jsonl", lines(CHAT, json.loads(json.dumps(CHAT).replace("assistant", "ai"))), format="messages"),
    read("loss.jsonl", lines({"messages": FLAGS, "channel": "x"}), f"d{END}", format="messages", rows=1),
    Case(
        "number.jsonl",
        lines(XY | {"output": 4}, XY | {"output": True, "input": 2}),
        "alpaca",
        (f"4{END}", f"true{END}"),
        notes=(3,),
    ),
    read("object.jsonl", lines(OBJECT), '{"b": [2]}' + END, rows=1, settings={"on_object": "json"}, notes=(2,)),
    read(
        "think.jsonl",
        lines(THOUGHT),
        f"<think>\nhm\n</think>\n\ny{END}",
        format="messages",
        rows=1,
        settings={"reasoning": "think"},
        notes=(1,),
    ),
    read(
        "answer.jsonl",
        lines(THOUGHT),
        format="messages",
        rows=1,
        settings={"reasoning": "think", "train_on": "answer"},
        notes=(1,),
    ),
    read("drop.jsonl", lines(THOUGHT), format="messages", rows=1, settings={"reasoning": "drop"}, notes=(1,)),
    read("greeting.jsonl", lines(GREETING), f"Hello{END}Yes?{END}", format="sharegpt", rows=1, notes=(1,)),
    read("system.jsonl", lines(SYSTEM_LATER), f"y{END}y{END}", format="messages", rows=1, notes=(1,)),
    read(
        "no-arguments.jsonl", lines(tools("", "36")), f"<now {{}}>{END}36{END}", format="messages", rows=1, notes=(1,)
    ),
    read("null.jsonl", lines(tools("{}", None)), f"<now {{}}>{END}36{END}", format="messages", rows=1, notes=(1,)),
]
REFUSED = [
    ("split.json", json.dumps({"test": [XY], "train": [XY]}), {}, "split: train"),
    ("columns.json", json.dumps({"instruction": {"0": "x"}, "output": {"0": "y"}}), {}, "table by columns"),
    ("comment.jsonl", "// rows\n" + lines(XY), {}, "is a comment"),
    ("object.jsonl", lines(OBJECT), {}, "set data.on_object=json"),
    ("reasoning.jsonl", lines(THOUGHT), {}, "set data.reasoning=think or data.reasoning=drop"),
    ("two.jsonl", lines({"question": "x", "answer": "y", "response": "z"}), {}, "completion: response}"),
    ("greeting.jsonl", lines(GREETING), {"turn_order": "strict"}, "set data.turn_order=any"),
    ("system.jsonl", lines(SYSTEM_LATER), {"turn_order": "strict"}, "set data.turn_order=any"),
    ("batch.jsonl", lines({"custom_id": "1", "url": "/v1", "body": CHAT}), {}, "requests of a batch API"),
    ("dataset_info.json", json.dumps({"mine": {"file_name": "rows.jsonl"}}), {}, "list of datasets"),
]


def load(file: Path, settings: dict[str, Any] | None) -> tuple[LoadedData, Any]:
    settings = settings or {}
    source = {"path": str(file)} | {key: settings[key] for key in ("split",) if key in settings}
    template = file.with_name("tools.jinja")
    template.write_text(TOOLS_TEMPLATE)
    cfg = DataConfig(
        train=[source],
        chat_template=str(template),
        cache=str(file.parent / "cache"),
        **{key: value for key, value in settings.items() if key != "split"},
    )
    tokenizer = load_tokenizer(ModelConfig(name=str(packaged("data") / "tiny-qwen2.5")))
    log_once.cache_clear()
    return load_data(Preparation(cfg, load_chat_template(cfg, tokenizer))), tokenizer


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_a_file_with_one_meaning_is_read_and_the_reading_is_counted(tmp_path: Path, capsys, case: Case):
    data, tokenizer = load(write(tmp_path, case.name, case.content), case.settings)
    [source] = data.train
    rows = [source.store[i] for i in range(len(source.store))]
    assert source.store.meta.format() == case.format
    assert [tokenizer.decode(row.ids[row.trained]) for row in rows] == list(case.trained)
    assert tuple(Counter(source.store.meta.notes).values()) == case.notes
    said = capsys.readouterr().err
    assert case.said in said and bool(case.said) == ("read " in said)


@pytest.mark.parametrize(("name", "content", "settings", "words"), REFUSED, ids=lambda value: str(value)[:20])
def test_a_file_with_two_meanings_or_none_is_refused_with_the_words_that_mend_it(
    tmp_path: Path, name, content, settings, words
):
    with pytest.raises(DataError) as error:
        load(write(tmp_path, name, content), settings)
    assert words in str(error.value)
    if words.startswith("set "):
        assert str(error.value).endswith(words)


def test_rules_change_the_name_of_the_cache_and_their_defaults_do_not(tmp_path: Path):
    file = write(tmp_path, "rows.jsonl", lines(CHAT))
    given = {"reasoning": "error", "on_object": "error", "turn_order": "any"}
    folders = [load(file, {key: value})[0].train[0].store.folder for key, value in given.items()]
    assert len({load(file, {})[0].train[0].store.folder, *folders}) == 1
    changed = [{"reasoning": "think"}, {"reasoning": "drop"}, {"on_object": "json"}, {"turn_order": "strict"}]
    assert len({load(file, rules)[0].train[0].store.folder for rules in changed} | {folders[0]}) == 5


# What the shared files give, where they differ from a file that is read without settings.
SHARED = {
    "d09_dict_out": {"on_object": "json"},
    "d26_reasoning": {"reasoning": "think"},
}
SHARED_REFUSED = {"d13_cols", "d13_comment", "d26_batchapi", "dataset_info"}


def test_the_files_that_users_reported_are_read_or_named(tmp_path: Path, shared: Path):
    files = sorted((shared / "bugs" / "rows").iterdir())
    assert len(files) >= 30
    for file in files:
        copy = write(tmp_path, file.name, file.read_bytes())
        if file.stem in SHARED_REFUSED | SHARED.keys():
            with pytest.raises(DataError):
                load(copy, {})
        if file.stem not in SHARED_REFUSED:
            data, _ = load(copy, SHARED.get(file.stem, {}))
            assert data.train[0].store.meta.rows == (3 if file.suffix == ".csv" and "e08" in file.name else 4)
