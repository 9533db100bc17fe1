"""Targets of fuzz.py: configs, overrides, rows, files of rows, templates, configs of other programs."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from pyarrow import parquet

from finetune.config.compose import load_config, to_yaml
from finetune.config.keys import schema_fields
from finetune.config.overrides import read_options
from finetune.config.peers import PEERS
from finetune.config.schema import DataConfig, RunConfig, SourceConfig
from finetune.data.formats.detection import with_formats
from finetune.data.formats.messages import Conversation, Message
from finetune.data.formats.parser import FORMATS
from finetune.data.media.processor import build_media_processor
from finetune.data.sources.paths import resolve_source
from finetune.data.sources.readers import RawBatch
from finetune.data.template import sandbox
from finetune.data.template.chat import ChatTemplate
from finetune.data.template.sandbox import Renderer
from finetune.data.tokens.prepare import Preparation
from finetune.migration.files import read_peer_config
from finetune.migration.migrate import as_yaml, migrate
from finetune.models.families import FAMILIES
from finetune.models.tokenizer import load_tokenizer
from finetune.system.errors import DataError
from finetune.system.resources import packaged
from tests.faults.mutations import Mutator, as_json

ROOT = Path(__file__).resolve().parents[2]
REPORTED = ROOT.parent / "shared" / "bugs" / "rows"  # files of users' reports, where the machine has them
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
_USER, _ASSISTANT = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
_CHAT = [
    {"role": "system", "content": "be brief"},
    _USER,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "7", "tool_call_id": "1"},
    _ASSISTANT | {"weight": 0.5, "reasoning_content": "well"},
]
_SHAREGPT = [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]
_SHAREGPT += [{"from": "observation", "value": "b"}, {"from": "gpt", "value": "c"}]
_PARTS = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
# Right rows of each format.
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": _CHAT, "tools": _TOOLS},
        {"messages": [_USER | {"content": _PARTS}, _ASSISTANT]},
        {"messages": [_USER | {"content": "<image><audio><video>"}, _ASSISTANT], "images": ["a.png"]}
        | {"audios": ["data:audio/wav;base64,UklGRg=="], "videos": [{"bytes": "AAAA", "path": "x.mp4"}]},
        {"messages": [_USER, _ASSISTANT], "label": True},
    ],
    "sharegpt": [{"conversations": _SHAREGPT, "system": "be brief", "tools": json.dumps(_TOOLS)}],
    "prompt_completion": [
        {"prompt": "a", "completion": "b"},
        {"prompt": [_USER, _ASSISTANT, _USER], "completion": [_ASSISTANT]},
    ],
    "prompt": [{"prompt": "a", "system": "b"}, {"prompt": [_USER]}],
    "preference": [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": [_USER, _ASSISTANT], "rejected": [_USER, _ASSISTANT | {"content": "other"}]},
    ],
    "alpaca": [{"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"}],
    "text": [{"text": "a document"}],
    "tokens": [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1], "completion_mask": [0, 1, 1]},
        {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 2, 3], "seq_lengths": [4]},
    ],
}
_NAMES = sorted({name for fmt in FORMATS.values() for name in (*fmt.columns, *fmt.keys)} | {"type", "text", "function"})
_KEYS = sorted({part for key in (*schema_fields(), *PEERS) for part in key.split(".")} | {"defaults", "_target_"})


@cache
def chat(base: str) -> ChatTemplate:
    """Return the template of a packaged base."""
    return ChatTemplate(load_tokenizer(RunConfig(model={"name": str(packaged("data") / base)}, data={}).model))


@cache
def _configs() -> list[str]:
    """Return the configs of whole runs, and the options of every group as runs."""
    runs = [*sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "configs" / "recipes").glob("*.yaml"))]
    groups = [file for file in sorted((ROOT / "configs").glob("*/*.yaml")) if file.parent.name != "recipes"]
    chosen = [f"defaults: [{{{file.parent.name}: {file.stem}}}]\n" for file in groups]
    return [file.read_text(encoding="utf-8") for file in runs] + chosen


def config_text(folder: Path) -> Any:
    """Files of configs, their text changed."""

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        text = rng.choice(_configs())
        raw = change.text(text).encode("utf-8", "replace") if change.often(0.8) else change.raw(text.encode())
        (folder / "run.yaml").write_bytes(raw)
        to_yaml(load_config(str(folder / "run.yaml")))

    return case


def config_tree(folder: Path) -> Any:
    """Files of configs, their keys and values changed."""
    trees = [yaml.safe_load(text) for text in _configs()]

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        tree = change.tree(rng.choice(trees), _KEYS)
        try:
            text = yaml.safe_dump(tree, allow_unicode=True)
        except RecursionError:
            text = "data: " + "[" * 3000
        (folder / "run.yaml").write_text(text, encoding="utf-8", errors="replace")
        config = load_config(str(folder / "run.yaml"), needs_data=False)
        (folder / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
        assert load_config(str(folder / "again.yaml"), needs_data=False) == config

    return case


def overrides(folder: Path) -> Any:
    """Words of a command line: of a run, and of a command."""
    from finetune.config import command_options

    schemas = [found for name, found in vars(command_options).items() if name.endswith("Options")]
    keys = [key.replace("*", "0") for key in schema_fields()]
    values = ["1", "true", "null", "nf4", "[a, b]", "{a: 1}", "'a b'", "2e-4", "[{path: a.jsonl}]", "${name}"]

    def word(change: Mutator, names: list[str]) -> str:
        key = change.rng.choice(names) if change.often(0.9) else change.name()
        value = change.text(change.rng.choice(values)) if change.often(0.6) else as_json(change.value())[:5000].decode()
        return change.text(f"{key}={value}") if change.often(0.2) else f"{key}={value}"

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        if change.often(0.5):
            schema = rng.choice(schemas)
            read_options(schema, [word(change, list(schema.model_fields)) for _ in range(rng.randint(1, 3))], "fuzz")
        else:
            load_config("quickstart", [word(change, keys) for _ in range(rng.randint(1, 3))])

    return case


def rows(folder: Path) -> Any:
    """Rows of every format, for every objective, with and without media."""
    base = packaged("data") / "tiny-qwen2.5-omni"
    media = build_media_processor(FAMILIES["qwen2_5_omni_thinker"], base, DataConfig())
    for name in ("a.png", "x.mp4"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n")

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        name = rng.choice(list(ROWS))
        lines = tuple(change.json(rng.choice(ROWS[name]), _NAMES) for _ in range(rng.randint(1, 3)))
        cfg = DataConfig(
            train=[SourceConfig(path=str(folder / "rows.jsonl"))],
            train_on=rng.choice(["assistant", "answer", "last", "all"]),
            reasoning=rng.choice(["error", "think", "drop"]),
            on_object=rng.choice(["error", "json"]),
            turn_order=rng.choice(["any", "strict"]),
        )
        source = SourceConfig(path="rows.jsonl", format=name if change.often(0.7) else "auto")
        objective = rng.choice(["none", "reward", "answers", "kto", "dpo"])
        with_media = change.often(0.5)
        preparation = Preparation(
            cfg,
            chat("tiny-qwen2.5-omni" if with_media else "tiny-qwen2.5"),
            objective=objective,
            media=media if with_media else None,
        )
        batch = RawBatch(str(folder / "rows.jsonl"), "line", 0, tuple(range(1, len(lines) + 1)), lines, 0)
        for each in with_formats(source, [batch], objective=objective):
            found = preparation.encoder(source)(each)
            assert len(found.rows) + len(found.bad) == len(lines)
            if found.bad and not len(found.rows):
                raise DataError(found.bad[0].reason)

    return case


def _files(folder: Path) -> dict[str, bytes]:
    """Return right files of rows by name."""
    plain = [{"prompt": f'question "{i}",\n', "completion": f"answer {i}"} for i in range(20)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in [*plain, *ROWS["prompt_completion"]])
    cells = io.StringIO()
    writer = csv.DictWriter(cells, plain[0])
    writer.writeheader()
    writer.writerows(plain)
    table = pyarrow.Table.from_pylist(
        [{"messages": [_USER, _ASSISTANT], "n": i, "x": {"a": [i, None]}} for i in range(9)]
    )
    packed, streamed = io.BytesIO(), io.BytesIO()
    parquet.write_table(table, packed, compression="snappy")
    with pyarrow.ipc.new_stream(streamed, table.schema) as stream:
        stream.write_table(table)
    kept = io.BytesIO()
    with pyarrow.ipc.new_file(kept, table.schema) as stream:
        stream.write_table(table)
    found = {
        "rows.jsonl": lines,
        "rows.json": json.dumps({"train": plain, "test": plain}, indent=1).encode(),
        "list.json": json.dumps(plain).encode(),
        "rows.csv": cells.getvalue().encode(),
        "rows.tsv": cells.getvalue().replace(",", "\t").encode("utf-16"),
        "rows.jsonl.gz": gzip.compress(lines),
        "rows.jsonl.bz2": bz2.compress(lines),
        "rows.jsonl.xz": lzma.compress(lines),
        "rows.jsonl.zst": pyarrow.compress(lines, "zstd", asbytes=True),
        "rows.parquet": packed.getvalue(),
        "stream.arrow": streamed.getvalue(),
        "file.arrow": kept.getvalue(),
    }
    reported = sorted(REPORTED.glob("*.*")) if REPORTED.is_dir() else []
    return found | {file.name: file.read_bytes() for file in reported}


def files(folder: Path) -> Any:
    """Files of rows of every kind, their bytes changed."""
    known = _files(folder)

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        name = rng.choice(list(known))
        path = folder / (name if change.often(0.9) else rng.choice(list(known)))
        path.write_bytes(change.raw(known[name]))
        source = SourceConfig(path=str(path), split=rng.choice([None, None, "train"]))
        count = 0
        for batch in with_formats(source, resolve_source(source).batches()):
            count += sum(not isinstance(row.value, DataError) for row in batch.rows())
        if not count:
            raise DataError("only bad rows")

    return case


@cache
def _templates() -> list[str]:
    from tests.unit.data.template.test_sandbox import BOMBS, ESCAPES

    written = [*(ROOT / "data").glob("*/chat_template.jinja"), *(ROOT / "configs" / "templates").glob("*.jinja")]
    return [file.read_text(encoding="utf-8") for file in sorted(written)] * 200 + [*BOMBS, *ESCAPES]


_TAGS = (
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if messages %}",
    "{% endif %}",
    "{{ messages }}",
    "{% set x = messages * 1000 %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ [messages] * 99999 | tojson }}",
    "{{ messages[0].content * 9999 }}",
    "{{ messages | attr('__class__') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages | map('string') | join | length }}",
    "{{ range(99999) | list }}",
    "{% set ns = namespace(a=[]) %}{% set ns.a = [ns.a, ns.a] %}",
    "{{ messages | sort(attribute='content') }}",
    "{{ ('%' ~ 99999 ~ 'd') % 1 }}",
    "{{ '{0:>99999}'.format(1) }}",
    "{{ raise_exception('no') }}",
    "{% include 'a' %}",
    "{{ messages | batch(1) | list }}",
    "{{ messages | groupby('role') | list }}",
    "{{ messages[0].content.split('') }}",
    "{{ 1 / 0 }}",
    "{{ messages.x.y }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ strftime_now('%Y%f%c') }}",
)


def templates(folder: Path) -> Any:
    """Chat templates: rendered, and as a row is encoded by one.

    A tenth of the sandbox's time: a row is rendered several times, and a case must end within CASE_SECONDS.
    """
    sandbox._RENDER_SECONDS /= 10
    tokenizer = load_tokenizer(RunConfig(model={"name": str(packaged("data") / "tiny-qwen2.5")}, data={}).model)
    conversation = Conversation((Message("system", "s"), Message("user", "u " * 50), Message("assistant", "a")))
    turns = [message.as_dict() for message in conversation.messages]

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        source = rng.choice(_templates())
        for _ in range(rng.randint(0, 3)):
            place = rng.randint(0, len(source))
            source = source[:place] + rng.choice(_TAGS) + source[place:]
        source = change.text(source) if change.often(0.5) else source
        if change.often(0.5):
            Renderer(source, {"bos_token": "<s>"}).render(turns, rng.choice([None, _TOOLS]), change.often(0.5))
            return
        chat = ChatTemplate(tokenizer, source)
        _ = chat.turn_end_id
        for found in chat.encode([conversation, replace(conversation, tools=tuple(_TOOLS))]):
            if isinstance(found, DataError):
                raise found

    return case


def peers(folder: Path) -> Any:
    """Configs, scripts and lists of datasets of other programs, which migrate reads."""
    known = {file.name: file.read_text() for file in sorted((ROOT / "tests" / "peer_configs").iterdir())}
    names = sorted({name for text in known.values() if (tree := _parsed(text)) for name in tree} | set(PEERS))

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        name = rng.choice(list(known))
        text, tree = known[name], _parsed(known[name])
        if isinstance(tree, dict) and not name.endswith(".sh") and change.often(0.8):
            tree = change.tree(tree, names)
            try:
                text = yaml.safe_dump(tree) if not name.endswith(".json") else json.dumps(tree)
            except RecursionError:
                text = "a: " + "[" * 3000
        else:
            text = change.text(text)
        (folder / name).write_text(text, encoding="utf-8", errors="replace")
        config = read_peer_config(folder / name, rng.choice(["auto", "auto", "auto", "trl"]))
        migration = migrate(config)
        (folder / "mine.yaml").write_text(as_yaml(migration, config, "mine.yaml"), encoding="utf-8", errors="replace")
        load_config(str(folder / "mine.yaml"), migration.words("").split()[1:])

    return case


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


TARGETS = {
    "config-text": config_text,
    "config-tree": config_tree,
    "overrides": overrides,
    "rows": rows,
    "files": files,
    "templates": templates,
    "peers": peers,
}
