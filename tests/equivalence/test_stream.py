"""Streamed rows: a step is the same on every rank, in any order of requests, and after a resume."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from transformers import AutoTokenizer

from finetune import train
from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.documents import Document
from finetune.data.stream import StreamingSampler
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.data.tokens.store import is_valid
from finetune.system.errors import ConfigError, DataError
from finetune.system.resources import packaged
from tests.runs import differing, metrics, small_run

ROWS = 50


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5"))


def sources(folder: Path, files: int = 2) -> list[SourceConfig]:
    """One source of several files and one of a single file, with unique rows."""
    (folder / "parts").mkdir()
    for part in range(files):
        lines = [json.dumps({"text": f"part {part} row {i}"}) for i in range(ROWS // files)]
        (folder / "parts" / f"{part}.jsonl").write_text("\n".join(lines))
    (folder / "single.jsonl").write_text("\n".join(json.dumps({"text": f"single {i}"}) for i in range(ROWS)))
    return [SourceConfig(path=str(folder / "parts/*.jsonl")), SourceConfig(path=str(folder / "single.jsonl"), weight=3)]


def sampler(folder: Path, train: list[SourceConfig], chat: ChatTemplate, main: bool = True, **settings):
    cfg = DataConfig(train=train, stream_rows=20, max_length=64, **settings)
    return StreamingSampler(Preparation(cfg, chat, main), batch_size=2, seed=3, folder=folder / "stream")


def shown(sequences: list[list[Document]]) -> list[list[tuple[str, bytes]]]:
    return [[(document.location, document.ids.tobytes()) for document in sequence] for sequence in sequences]


def test_a_step_does_not_depend_on_earlier_requests(tmp_path, chat):
    train = sources(tmp_path)
    walked = sampler(tmp_path, train, chat)
    steps = [shown(walked.step_batches(step)) for step in range(30)]
    walked.close()
    for last in (29, 0, 17):  # a resumed run: the windows are there, or their steps alone, or nothing
        resumed = sampler(tmp_path, train, chat)
        assert [shown(resumed.step_batches(step)) for step in (last, last, 4)] == [steps[last], steps[last], steps[4]]
        resumed.close()
        if last:
            for window in (tmp_path / "stream" / resumed.digest).glob("window-*/"):
                shutil.rmtree(window)
        else:
            shutil.rmtree(tmp_path / "stream")


def test_windows_mix_the_sources_by_weight_and_a_pass_visits_every_row_once(tmp_path, chat):
    stream = sampler(tmp_path, sources(tmp_path), chat, packing=False)
    # 5 rows of the parts and 15 of the single file a window: ten windows of ten steps are one pass and three.
    steps = [stream.step_batches(step) for step in range(100)]
    stream.close()
    seen = Counter(document.location for sequences in steps for sequence in sequences for document in sequence)
    parts = {place: count for place, count in seen.items() if "parts" in place}
    assert set(parts.values()) == {1} and len(parts) == ROWS
    assert {count for place, count in seen.items() if "single" in place} == {3}


def test_every_file_of_a_stream_has_its_own_format(tmp_path, chat):
    for name, rows in (
        ("a", [{"text": f"text {i}"} for i in range(15)]),
        ("b", [{"question": f"{i}", "answer": "x"} for i in range(15)]),
        ("c", [{"unknown": 1}, *({"text": f"more {i}"} for i in range(15))]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = SourceConfig(path=f"{tmp_path}/*.jsonl")
    stream = sampler(tmp_path, [source], chat, packing=False, on_bad_row="skip", max_bad_share=0.2)
    steps = [stream.step_batches(step) for step in range(45)]
    stream.close()
    seen = Counter(document.location for sequences in steps for sequence in sequences for document in sequence)
    assert {place.rpartition("/")[2][0] for place in seen} == {"a", "b", "c"} and len(seen) == 45


def test_another_seed_is_another_order(tmp_path, chat):
    train = sources(tmp_path)
    orders = []
    for seed in (0, 0, 1):
        preparation = Preparation(DataConfig(train=train, stream_rows=20, max_length=64), chat)
        stream = StreamingSampler(preparation, batch_size=2, seed=seed, folder=tmp_path / f"s{len(orders)}")
        orders.append([shown(stream.step_batches(step)) for step in range(6)])
        stream.close()
    assert orders[0] == orders[1] != orders[2]


def test_old_windows_leave_the_disk(tmp_path, chat):
    stream = sampler(tmp_path, sources(tmp_path), chat)
    for step in range(30):
        stream.step_batches(step)
    stream.close()
    assert len(list((tmp_path / "stream" / stream.digest).glob("window-*/"))) <= 3


def test_other_ranks_wait_for_the_main_one_and_see_the_same(tmp_path, chat):
    train = sources(tmp_path)
    ranks = [sampler(tmp_path, train, chat, main=main) for main in (True, False)]
    together = Barrier(2)  # as the gradients of a step are

    def walk(rank: StreamingSampler) -> list:
        steps = []
        for step in range(30):
            try:
                steps.append(shown(rank.step_batches(step)))
            except BaseException:
                together.abort()  # or the other rank waits for ever
                raise
            together.wait()
        return steps

    with ThreadPoolExecutor(2) as threads:
        steps = list(threads.map(walk, ranks))
    assert steps[0] == steps[1]
    for rank in ranks:
        rank.close()


def test_closing_leaves_no_half_window(tmp_path, chat):
    stream = sampler(tmp_path, sources(tmp_path), chat)
    stream.step_batches(0)  # the next window is being made from now on
    stream.close()
    stores = list((tmp_path / "stream" / stream.digest).glob("window-*/*/"))
    assert all(is_valid(store) for store in stores) and len(stores) in (2, 3, 4)


def test_a_bad_row_stops_the_stream_at_its_location(tmp_path, chat):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*(json.dumps({"text": f"row {i}"}) for i in range(25)), "{broken", ""]))
    stream = sampler(tmp_path, [SourceConfig(path=str(file))], chat)
    stream.step_batches(0)
    with pytest.raises(DataError, match=r"rows.jsonl:26: is not JSON"):
        for step in range(1, 20):
            stream.step_batches(step)
    stream.close()


def test_skipped_rows_stay_listed_when_their_window_is_gone(tmp_path, chat):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(["{broken", *(json.dumps({"text": f"row {i}"}) for i in range(99))]))
    source = SourceConfig(path=str(file))
    stream = sampler(tmp_path, [source], chat, packing=False, on_bad_row="skip", max_bad_share=0.1)
    for step in range(40):
        stream.step_batches(step)
    stream.close()
    assert not (stream.folder / "window-0").exists()
    [listed] = stream.folder.glob("window-0-*bad_rows.jsonl")
    assert json.loads(listed.read_text())["place"] == f"{file}:1"


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    settings = ("data.stream_rows=12", "train.save_every=4", "train.max_steps=8", "train.keep_checkpoints=9")
    train(small_run(tmp_path / "whole", *settings))
    # What a kill after step 4 leaves, less the stream's windows: a checkpoint is all that a run needs.
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "parted" / "checkpoint-4")
    train(small_run(tmp_path / "parted", *settings, "train.resume=auto"))
    assert differing(tmp_path / "whole", tmp_path / "parted") == []
    assert metrics(tmp_path / "whole")[4:] == metrics(tmp_path / "parted")
    # Who tokenizes, and where the tokens lie, is no part of a run.
    train(small_run(tmp_path / "parted", *settings, "data.workers=1", "train.resume=auto", "data.max_bad_share=0.2"))
    with pytest.raises(ConfigError, match=r"data.stream_rows"):
        train(small_run(tmp_path / "parted", *settings, "data.stream_rows=13", "train.resume=auto"))
