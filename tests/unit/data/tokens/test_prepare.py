"""A source is tokenized once: equal for any number of processes, found again if nothing changed, never incomplete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.sources import text_files
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens import prepare
from finetune.data.tokens.prepare import Preparation
from finetune.data.tokens.store import TokenStore, is_valid
from finetune.system.errors import DataError, ResourceError
from finetune.system.resources import packaged
from finetune.system.sealed import unseal

TINY = packaged("data") / "tiny-qwen2.5"


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(AutoTokenizer.from_pretrained(TINY))


def rows(folder: Path, count: int = 5, name: str = "rows.jsonl", bad: bool = False) -> Path:
    file = folder / name
    lines = [json.dumps({"prompt": f"question {i}", "completion": f"answer {i} " * (i % 7 + 1)}) for i in range(count)]
    if bad:
        lines[count // 2] = "{broken"
    file.write_text("\n".join(lines))
    return file


def preparation(folder: Path, chat: ChatTemplate, file: Path, main: bool = True, **settings) -> Preparation:
    source = {key: settings.pop(key) for key in ("limit", "columns", "format", "weight") if key in settings}
    cache = str(folder / "cache")
    return Preparation(DataConfig(train=[SourceConfig(path=str(file), **source)], cache=cache, **settings), chat, main)


def store_of(prepared: Preparation) -> TokenStore:
    return prepared.store(prepared.cfg.train[0])


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_processes_changes_nothing(tmp_path, chat, workers, monkeypatch):
    monkeypatch.setattr(text_files, "BATCH_BYTES", 10_000)
    file = rows(tmp_path, 2_000, bad=True)
    alone = store_of(preparation(tmp_path / "alone", chat, file))
    shared = store_of(preparation(tmp_path / "shared", chat, file, workers=workers))
    assert len(alone) == 1_999
    for name in ("lengths", "targets", "indices", "hashes", "control_tokens"):
        assert np.array_equal(getattr(alone, name), getattr(shared, name)), name
    assert alone.meta.content == shared.meta.content
    assert alone.bad_rows.read_text() == shared.bad_rows.read_text()
    assert alone.location(1_000) == shared.location(1_000) == f"{file}:1002"


def test_a_cached_source_is_not_tokenized_again(tmp_path, chat, monkeypatch):
    file = rows(tmp_path)
    first = store_of(preparation(tmp_path, chat, file))
    monkeypatch.setattr(prepare, "encode_all", lambda *arguments: pytest.fail("tokenized a second time"))
    # Neither of these decides the tokens of a row.
    for settings in ({}, {"max_length": 7, "truncation": "left"}, {"held_out": 0.2}, {"weight": 3.0}, {"workers": 2}):
        again = store_of(preparation(tmp_path, chat, file, **settings))
        assert again.folder == first.folder


def test_everything_that_decides_the_tokens_is_in_the_fingerprint(tmp_path, chat):
    file = rows(tmp_path)
    other_template = ChatTemplate(AutoTokenizer.from_pretrained(TINY), chat.template + " ")
    other_tokenizer = AutoTokenizer.from_pretrained(TINY)
    other_tokenizer.add_tokens(["question"])
    stores = [
        store_of(preparation(tmp_path, chat, file)),
        store_of(preparation(tmp_path, chat, file, train_on="all")),
        store_of(preparation(tmp_path, chat, file, system="be brief")),
        store_of(preparation(tmp_path, chat, file, limit=3)),
        store_of(preparation(tmp_path, chat, file, columns={"prompt": "completion", "completion": "prompt"})),
        store_of(preparation(tmp_path, other_template, file)),
        store_of(preparation(tmp_path, ChatTemplate(other_tokenizer), file)),
        store_of(preparation(tmp_path, chat, rows(tmp_path, name="moved.jsonl"))),
    ]
    file.write_text(file.read_text().replace("answer 1", "answer one"))
    stores.append(store_of(preparation(tmp_path, chat, file)))
    assert len({store.folder for store in stores}) == len(stores)
    assert "answer one" in AutoTokenizer.from_pretrained(TINY).decode(stores[-1][1].ids)


@pytest.mark.parametrize(("on_bad_row", "made_again"), [("error", True), ("skip", False)])
def test_bad_rows_of_an_older_reader_are_read_again_where_they_are_an_error(tmp_path, chat, on_bad_row, made_again):
    prepared = preparation(tmp_path, chat, rows(tmp_path, bad=True), on_bad_row=on_bad_row)
    meta = store_of(prepared).folder / "meta.json"
    meta.write_text(json.dumps(unseal(json.loads(meta.read_text())) | {"reader": 0}))
    again = store_of(prepared)
    assert (again.meta.reader > 0) == made_again and again.meta.bad_rows == 1


SLOW_TOKENIZATION = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.tokens import prepare
from finetune.data.tokens import store
from finetune.data.template.chat import ChatTemplate
folder = Path(sys.argv[1])
append = store.StoreWriter.append
def slow(writer, batch):
    append(writer, batch)
    print("written", flush=True)
    sys.stdin.read()
store.StoreWriter.append = slow
cfg = DataConfig(train=[SourceConfig(path=str(folder / "rows.jsonl"))], cache=str(folder / "cache"), workers=1)
prepare.Preparation(cfg, ChatTemplate(AutoTokenizer.from_pretrained(sys.argv[2]))).store(cfg.train[0])
"""


def test_leftovers_of_a_killed_tokenization_are_not_used(tmp_path, chat):
    file = rows(tmp_path)
    command = [sys.executable, "-c", SLOW_TOKENIZATION, str(tmp_path), str(TINY)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert process.stdout.readline() == "written\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    threads = [p for t in Path(f"/proc/{process.pid}/task").iterdir() for p in (t / "children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    [left] = [folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]
    assert left.name.startswith(".") and not is_valid(left)
    store = store_of(preparation(tmp_path, chat, file))
    assert len(store) == 5
    assert [folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()] == [store.folder]
    # Its workers see their closed pipes and exit.
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in (*children, *threads)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_a_failed_tokenization_leaves_nothing(tmp_path, chat, monkeypatch):
    file = rows(tmp_path)
    monkeypatch.setattr(prepare.StoreWriter, "finish", lambda *arguments: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(ResourceError, match=r"data\.cache: .*: the disk is full"):
        store_of(preparation(tmp_path, chat, file))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_damaged_store_is_made_again(tmp_path, chat):
    file = rows(tmp_path)
    first = store_of(preparation(tmp_path, chat, file))
    ids = first[0].ids.tolist()
    os.truncate(first.folder / "ids.bin", 8)
    assert store_of(preparation(tmp_path, chat, file))[0].ids.tolist() == ids


def test_processes_that_start_together_make_one_store(tmp_path, chat):
    file = rows(tmp_path, 2_000)
    ranks = [preparation(tmp_path, chat, file, main=main, workers=1) for main in (True, True, False, False)]
    with ThreadPoolExecutor(4) as threads:
        stores = list(threads.map(store_of, ranks))
    assert len({store.folder for store in stores}) == 1
    assert all(np.array_equal(store.lengths, stores[0].lengths) for store in stores)


def test_waiting_for_a_store_that_no_process_makes_is_an_error(tmp_path, chat, monkeypatch):
    monkeypatch.setattr(prepare, "_PATIENCE_SECONDS", 0.5)
    with pytest.raises(ResourceError, match="main rank"):
        store_of(preparation(tmp_path, chat, rows(tmp_path), main=False))


def test_a_dead_worker_is_an_error_with_advice(tmp_path, chat, monkeypatch):
    monkeypatch.setattr("finetune.data.tokens.encode._CHILD", "import os; os._exit(137)")
    with pytest.raises(ResourceError, match=r"exit code 137.*data.workers"):
        store_of(preparation(tmp_path, chat, rows(tmp_path, 2_000), workers=2))


def test_a_source_without_a_usable_row_is_an_error(tmp_path, chat):
    file = tmp_path / "rows.jsonl"
    file.write_text("{broken\n[1]\n")
    store = store_of(preparation(tmp_path, chat, file))
    assert (len(store), store.meta.bad_rows) == (0, 2)
    file.write_text('{"question": 1}\n')
    with pytest.raises(DataError, match=r"rows.jsonl.*question"):
        store_of(preparation(tmp_path, chat, file))
