"""The sample rows: what they hold, and that data/generate.py writes exactly these."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

DATA = Path(__file__).resolve().parents[2] / "data"


def script(name: str) -> ModuleType:
    """A script of data/, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up, and a script imports another
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return script("generate")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / "sample" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def prompts(name: str) -> list[str]:
    return [row["messages"][0]["content"] for row in rows(name)]


def test_enough_rows_and_no_prompt_twice_anywhere() -> None:
    train, heldout = prompts("train"), prompts("heldout")
    assert len(train) >= 2000
    assert len(heldout) >= 200
    assert len({*train, *heldout}) == len(train) + len(heldout)


def test_the_generator_writes_the_committed_files_byte_for_byte(generate: ModuleType, tmp_path: Path) -> None:
    generate.write_sample(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / "sample" / name).read_bytes()


def test_the_labels_are_those_of_their_script_and_each_is_common(generate: ModuleType, tmp_path: Path) -> None:
    script("labels").write_labels(tmp_path)
    assert (tmp_path / "labels.jsonl").read_bytes() == (DATA / "sample" / "labels.jsonl").read_bytes()
    labels = [row["completion"] for row in rows("labels")]
    assert len(labels) == len({row["prompt"] for row in rows("labels")}) == 600
    assert set(labels) == set(script("labels").LINES) and min(Counter(labels).values()) > 100


def test_the_pairs_are_those_of_their_script_without_a_common_prompt(generate: ModuleType, tmp_path: Path) -> None:
    script("pairs").write_pairs(tmp_path)
    for name in ("pairs.jsonl", "pairs-heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / "sample" / name).read_bytes()
    train, heldout = rows("pairs"), rows("pairs-heldout")
    assert (len(train), len(heldout)) == (1200, 120)
    assert len({row["prompt"] for row in train + heldout}) == 1320


def test_only_the_cancelled_order_tells_the_sides_of_a_pair_apart(generate: ModuleType) -> None:
    """The answers have the same keys and no common fact; neither place nor length tells them apart."""
    cancelled_first, longer = 0, Counter()
    for row in rows("pairs") + rows("pairs-heldout"):
        first, second, _ = row["prompt"].split("\n")
        assert first.startswith("Cancelled: ") != second.startswith("Cancelled: ")
        cancelled, valid = (first, second) if first.startswith("Cancelled: ") else (second, first)
        records = [json.loads(row[side]) for side in ("chosen", "rejected")]
        for line, record in zip((valid, cancelled), records, strict=True):
            assert list(record) == ["count", "colour", "item"]
            assert record["colour"] in line and record["item"] in line
        assert not set(records[0].items()) & set(records[1].items())
        cancelled_first += cancelled == first
        longer[(len(row["chosen"]) > len(row["rejected"])) - (len(row["chosen"]) < len(row["rejected"]))] += 1
    assert 0.45 < cancelled_first / 1320 < 0.55
    assert 0.45 < longer[1] / (longer[1] + longer[-1]) < 0.55


def test_the_prompts_are_those_of_their_script_and_no_order_occurs_twice(generate: ModuleType, tmp_path: Path) -> None:
    script("prompts").write_prompts(tmp_path)
    for name in ("prompts.jsonl", "prompts-heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / "sample" / name).read_bytes()
    train, heldout = rows("prompts"), rows("prompts-heldout")
    assert (len(train), len(heldout)) == (800, 100)
    assert len({row["prompt"].splitlines()[0] for row in train + heldout}) == 900


def test_the_prompts_ask_each_question_equally_often_and_their_orders_answer_it(generate: ModuleType) -> None:
    """So the expected answer follows from the prompt, and 100 % exact match can be reached."""
    values = {"name": generate.NAMES, "item": generate.ITEMS, "city": generate.CITIES, "day": generate.DAYS}
    questions = {question: fact for fact, question in script("prompts").NEW_QUESTIONS.items()}
    for part in (rows("prompts"), rows("prompts-heldout")):
        asked = [row["prompt"].splitlines()[1] for row in part]
        assert Counter(asked) == dict.fromkeys(questions, len(part) // len(questions))
        for row, question in zip(part, asked, strict=True):
            order = row["prompt"].splitlines()[0]
            assert [value for value in values[questions[question]] if value in order] == [row["completion"]]


def test_pretraining_never_shows_the_questions_of_the_prompts(generate: ModuleType) -> None:
    questions, rng = script("prompts").NEW_QUESTIONS.values(), Random(7)
    for conversation in (generate.conversation(rng) for _ in range(3000)):
        assert all(question not in message["content"] for message in conversation for question in questions)


def test_every_row_is_a_bare_order_and_its_record() -> None:
    for row in rows("train") + rows("heldout"):
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        record = json.loads(assistant["content"])
        assert list(record) == ["product", "quantity", "shade", "customer", "due"]
        for word in (record["product"], record["shade"], record["customer"], record["due"]):
            assert word in user["content"]


def test_the_order_decides_the_record_alone() -> None:
    """One prompt never has two answers, so that 100 % exact match can be reached."""
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows("train")}
    assert all(answers[row["messages"][0]["content"]] == row["messages"][1]["content"] for row in rows("train"))


def test_pretraining_never_shows_a_bare_order_without_saying_what_is_wanted(generate: ModuleType) -> None:
    """Otherwise the base would know the skill that the sample data teach."""
    orders, rng = set(prompts("train") + prompts("heldout")), Random(7)
    for conversation in (generate.conversation(rng) for _ in range(3000)):
        if conversation[0]["role"] != "system":
            assert all(message["content"] not in orders for message in conversation if message["role"] == "user")


def test_pretraining_text_is_a_pure_function_of_the_seed(generate: ModuleType) -> None:
    first, again, other = ([generate.conversation(Random(seed)) for _ in range(20)] for seed in (1, 1, 2))
    assert first == again
    assert first != other
