"""`finetune init`: a config for a dataset and a machine, which loads, fits and trains."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetune import load_config, train
from finetune.cli import main
from finetune.commands.init import _models
from finetune.config.schema import SourceConfig
from finetune.models.families import shape_of
from finetune.planning import starter as starter_module
from finetune.planning.auto_batch import estimate_memory
from finetune.planning.inputs import plan_inputs
from finetune.planning.starter import propose, read_facts
from finetune.system.errors import DataError

PAIRS = [(f"What is {n} plus {n}?", f"It is {2 * n}.") for n in range(40)]
SHAREGPT = [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in PAIRS]
COMPLETIONS = [{"prompt": a, "completion": b} for a, b in PAIRS]


def messages(names: tuple[str, str] = ("user", "assistant")) -> list[dict[str, Any]]:
    return [{"messages": [{"role": r, "content": t} for r, t in zip(names, p, strict=True)]} for p in PAIRS]


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)


# File name -> (how to write it, words of the command, what it is).
FILES: dict[str, tuple[Any, list[str], str]] = {
    "messages.jsonl": (lambda p: write_lines(p, messages()), [], "messages"),
    "roles.jsonl": (
        lambda p: write_lines(p, messages(("customer", "agent"))),
        ["roles={user: customer, assistant: agent}"],
        "messages",
    ),
    "sharegpt.json": (
        lambda p: p.write_text(
            json.dumps(
                [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in PAIRS]
            )
        ),
        [],
        "sharegpt",
    ),
    "alpaca.json": (
        lambda p: p.write_text(json.dumps([{"instruction": a, "output": b} for a, b in PAIRS])),
        [],
        "alpaca",
    ),
    "pairs.jsonl": (
        lambda p: write_lines(p, COMPLETIONS),
        [],
        "prompt_completion",
    ),
    "faq.csv": (
        lambda p: write_csv(p, [("question", "answer"), *PAIRS]),
        ["columns={prompt: question, completion: answer}"],
        "prompt_completion",
    ),
    "pairs.tsv": (lambda p: write_csv(p, [("prompt", "completion"), *PAIRS]), [], "prompt_completion"),
    "text.jsonl.gz": (
        lambda p: p.write_bytes(gzip.compress("\n".join(json.dumps({"text": a + b}) for a, b in PAIRS).encode())),
        [],
        "text",
    ),
    "table.parquet": (
        lambda p: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(COMPLETIONS), p),
        [],
        "prompt_completion",
    ),
    "tokens.jsonl": (
        lambda p: write_lines(p, [{"input_ids": list(range(n, n + 40))} for n in range(100, 140)]),
        [],
        "tokens",
    ),
    "some-bad.jsonl": (lambda p: write_lines(p, [*messages(), {"messages": []}]), [], "messages"),
}


@pytest.fixture(params=FILES)
def dataset(request, tmp_path, monkeypatch) -> tuple[str, list[str], str]:
    monkeypatch.chdir(tmp_path)
    write, words, kind = FILES[request.param]
    write(Path(request.param))
    return request.param, words, kind


def test_the_config_of_any_file_loads_and_fits(dataset, capsys):
    name, words, kind = dataset
    assert main(["init", name, "gpu_gb=16", *words]) == 0
    printed = capsys.readouterr().err
    assert f"format={kind}" in printed and "rows=40" in printed
    config = load_config("finetune.yaml")
    assert config.data.train == [SourceConfig(path=name, **load_words(words))]
    assert config.model.name == ("Qwen/Qwen2.5-7B" if kind == "text" else "Qwen/Qwen2.5-7B-Instruct")
    assert config.data.on_bad_row == ("skip" if "bad" in name else "error")
    inputs = plan_inputs(config, shape_of(config.model.name), device_type="cuda")
    assert estimate_memory(inputs, 16e9).needed_bytes <= 16e9


def load_words(words: list[str]) -> dict[str, Any]:
    import yaml

    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}


def test_the_config_of_any_file_trains_a_step(dataset):
    name, words, _ = dataset
    assert main(["init", name, "out=mine.yaml", *words]) == 0
    base = load_config("quickstart.yaml").model.name
    small = [
        f"model.name={base}",
        "train.epochs=null",
        "train.max_steps=1",
        "train.batch_size=2",
        "data.max_length=128",
    ]
    assert train(load_config("mine.yaml", [*small, "data.max_bad_share=0.5", "output_dir=run"])).steps == 1


@pytest.mark.parametrize(("gpu_gb", "size"), [(80, "7B"), (8, "7B"), (6, "3B"), (3, "1.5B")])
def test_the_model_is_the_largest_that_fits(gpu_gb, size, tmp_path):
    write_lines(tmp_path / "a.jsonl", messages())
    starter = propose(read_facts(SourceConfig(path=str(tmp_path / "a.jsonl"))), "cuda", gpu_gb * 1e9)
    assert starter.model == f"qwen2.5-{size.lower()}-instruct"
    assert starter.peak_bytes <= gpu_gb * 1e9


def test_the_steps_of_a_large_file_count_its_unread_rows(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", messages() * 50)
    source = SourceConfig(path=str(tmp_path / "a.jsonl"))
    whole = read_facts(source).total_tokens
    monkeypatch.setattr(starter_module, "_ROWS_READ", 100)
    facts = read_facts(source)
    assert (facts.rows, facts.complete) == (100, False)
    # By the size of the file, whose JSON counts too: never fewer than the rows have.
    assert facts.total_tokens >= whole > sum(facts.tokens)


def test_a_handful_of_examples_is_trained_whole(tmp_path):
    write_lines(tmp_path / "a.jsonl", messages()[:5])
    settings = propose(read_facts(SourceConfig(path=str(tmp_path / "a.jsonl"))), "cuda", 16e9).settings
    assert "data.held_out" not in settings and "train.eval_every" not in settings


def test_long_examples_get_a_long_sequence_or_are_cut(tmp_path):
    rows = [{"prompt": "word " * 12_000, "completion": "yes"} for _ in range(50)]
    write_lines(tmp_path / "a.jsonl", rows)
    facts = read_facts(SourceConfig(path=str(tmp_path / "a.jsonl")))
    large = propose(facts, "cuda", 80e9, model="qwen2.5-7b-instruct").settings
    assert large["data.max_length"][0] > facts.longest_tokens and "data.truncation" not in large
    small = propose(facts, "cuda", 8e9, model="qwen2.5-7b-instruct").settings
    assert small["data.max_length"][0] < facts.longest_tokens and small["data.truncation"][0] == "right"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ([], "one dataset"),
        (["a.jsonl", "b.jsonl"], "one dataset"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["a.jsonl", "model=gpt-4"], "model=gpt-4"),
        (["a.jsonl", "out=a.json"], "out=a.json"),
        (["a.jsonl", "gpu_gb=1", "model=qwen2.5-7b"], "qwen2.5-7b"),
        (["odd.jsonl"], "fit no format"),
        (["empty.jsonl"], "empty.jsonl"),
    ],
)
def test_what_cannot_be_planned_is_refused_and_nothing_is_written(words, key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("a.jsonl"), messages())
    write_lines(Path("odd.jsonl"), [{"x": 1}])
    Path("empty.jsonl").write_text("")
    assert main(["init", *words]) in (2, 3)
    error = capsys.readouterr().err
    assert key in error and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "odd.jsonl", "empty.jsonl"}


@pytest.mark.parametrize(
    ("kinds", "device", "model"),
    [
        (["images"], "cuda", "qwen2.5-vl-7b-instruct"),
        (["images", "audios"], "cuda", "qwen2.5-omni-7b"),
        (["audios"], "cpu", "qwen2.5-omni-3b"),
        (["videos"], "cpu", "qwen2.5-vl-3b-instruct"),
    ],
)
def test_rows_with_files_get_a_model_that_reads_them(tmp_path: Path, kinds: list[str], device: str, model: str):
    tags = "".join(f"<{kind[:-1]}>" for kind in kinds)
    rows = [{"prompt": f"{tags}{a}", "completion": b, **{kind: ["file"] for kind in kinds}} for a, b in PAIRS]
    write_lines(tmp_path / "rows.jsonl", rows)
    facts = read_facts(SourceConfig(path=str(tmp_path / "rows.jsonl")))
    assert facts.files == {kind[:-1]: len(PAIRS) for kind in kinds} and facts.longest_tokens > 700
    assert propose(facts, device, 80e9).model == model
    with pytest.raises(DataError, match=model[:10]):
        propose(facts, device, 80e9, model="qwen2.5-7b-instruct")


def test_every_packaged_model_can_be_proposed(tmp_path: Path):
    write_lines(tmp_path / "rows.jsonl", COMPLETIONS)
    facts = read_facts(SourceConfig(path=str(tmp_path / "rows.jsonl")))
    for name in _models():
        assert propose(facts, "cuda", 600e9, model=name).model == name
