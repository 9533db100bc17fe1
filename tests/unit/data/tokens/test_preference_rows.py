"""Rows with preferences: both sides in one row, with the answers as targets; what an objective cannot use is named."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from finetune.config.compose import load_config
from finetune.config.schema import DataConfig, ModelConfig, SourceConfig
from finetune.data.batch import build_batch
from finetune.data.early_checks import check_source
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.loader import first_conversations, load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.models.tokenizer import load_tokenizer
from finetune.objectives.preference import check_preference, mismatched
from finetune.system.errors import DataError

REAL = Path(__file__).resolve().parents[5] / "shared/datasets/preference"
PAIR = {"prompt": "Two plus two?", "chosen": "4", "rejected": "It is five."}
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2"},
]
SAID = {"role": "assistant", "content": "4"}


@pytest.fixture(scope="module")
def tokenizer(repo_root):
    return load_tokenizer(ModelConfig(name=str(repo_root / "data/tiny-qwen2.5")))


@pytest.fixture
def load(tokenizer, tmp_path):
    def load(objective: str, *rows: dict, **settings):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = DataConfig(train=[SourceConfig(path=str(file))], cache=str(tmp_path / "cache"), **settings)
        return load_data(Preparation(cfg, ChatTemplate(tokenizer), objective=objective)).documents

    return load


def answer(document, tokenizer) -> str:
    return tokenizer.decode(document.labels[document.labels != IGNORE_INDEX])


def test_a_pair_is_one_row_of_two_sides_with_the_answers_as_targets(load, tokenizer):
    [document] = load("dpo", PAIR)
    chosen, rejected = document.sides
    assert [answer(side, tokenizer) for side in (chosen, rejected)] == ["4<|im_end|>", "It is five.<|im_end|>"]
    assert np.concatenate([chosen.ids, rejected.ids]).tolist() == document.ids.tolist()
    assert document.target_tokens == chosen.target_tokens + rejected.target_tokens
    batch = build_batch([document, document], share_prefixes=True)
    assert batch.sides == ((0, 1), (2, 3))
    assert batch.rows < len(chosen) + len(rejected), "prompts are computed once"


def test_a_verdict_makes_a_row_one_side(load, tokenizer):
    labels = (True, False, 1, "false")
    rows = [{"prompt": f"Say {i}", "completion": "4", "label": label} for i, label in enumerate(labels)]
    talk = [*TALK, {"role": "assistant", "content": "4"}]
    documents = load("kto", *rows)
    sides = [[side is not None for side in document.sides] for document in documents]
    assert sides == [[True, False], [False, True]] * 2
    [document] = load("kto", {"messages": talk, "label": True})
    assert answer(document.sides[0], tokenizer) == "4<|im_end|>", "only the last answer is judged"
    batch = build_batch(list(load("kto", *rows[:2])))
    assert batch.sides == ((0, -1), (-1, 1))


@pytest.mark.parametrize(
    ("objective", "row", "words"),
    [
        ("none", PAIR, "preference.objective=dpo"),
        ("none", {"prompt": "q", "completion": "a", "label": False}, "learn with kto"),
        ("dpo", {"prompt": "q", "completion": "a"}, "needs chosen and rejected answers"),
        ("dpo", PAIR | {"rejected": "4"}, "equal"),
        ("dpo", PAIR | {"rejected": "4 \n"}, "white space at their ends, are equal"),
        ("kto", {"chosen": [*TALK, SAID], "rejected": [*TALK, SAID | {"content": " 4"}]}, "white space at their ends"),
        ("dpo", {"chosen": [*TALK, SAID], "rejected": [*TALK[:2], TALK[0], SAID]}, "both need the same prompt"),
        ("dpo", {"prompt": "q", "chosen": "4", "rejected": None}, "rejected is empty"),
        ("dpo", PAIR | {"rejected": " \n"}, "rejected is empty"),
        ("dpo", PAIR | {"chosen": ""}, "chosen is empty"),
        ("dpo", PAIR | {"chosen": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weights"),
        ("dpo", PAIR | {"rejected": [{"role": "user", "content": "a"}]}, "whole conversation"),
        ("kto", {"prompt": "q", "completion": "a"}, "label or kto_tag"),
        ("kto", {"prompt": "q", "completion": "a", "label": "good"}, "true (a good answer) or false"),
        ("kto", {"text": "words"}, "or a label"),
    ],
)
def test_a_row_that_an_objective_cannot_use_is_named(load, objective, row, words):
    with pytest.raises(DataError, match=r"rows\.jsonl:1") as error:
        load(objective, row)
    assert words in str(error.value)


def test_a_pair_without_its_rejected_side_is_named_among_good_ones(load):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the row lacks rejected"):
        load("dpo", PAIR, {"prompt": "q", "chosen": "a"}, PAIR)


def test_sides_may_differ_in_the_white_space_within_them(load):
    assert len(load("dpo", PAIR | {"chosen": "if a:\n    b", "rejected": "if a:\nb"})) == 1


def test_a_pair_too_long_is_dropped_whole_or_named(load):
    long = PAIR | {"rejected": "word " * 200}
    assert len(load("dpo", PAIR, long, max_length=120)) == 1
    with pytest.raises(DataError, match=r"longer than data\.max_length=120.*\n.*rows\.jsonl:2: "):
        load("dpo", PAIR, long, max_length=120, truncation="error")


@pytest.mark.parametrize("label", [True, False])
def test_kto_needs_good_and_bad_answers_over_all_sources(tokenizer, tmp_path, label):
    def check(*labels: bool) -> None:
        files = [tmp_path / f"{given}.jsonl" for given in labels]
        for file, given in zip(files, labels, strict=True):
            file.write_text(json.dumps({"prompt": "q", "completion": str(given), "label": given}))
        words = [f"data.train=[{', '.join(map(str, files))}]", "data.eval=[]", f"data.cache={tmp_path / 'cache'}"]
        cfg = load_config("kto.yaml", words)
        check_preference(cfg, load_data(Preparation(cfg.data, ChatTemplate(tokenizer), objective="kto")))

    check(label, not label)
    with pytest.raises(DataError, match=f"every answer is {'good' if label else 'bad'}"):
        check(label)


def test_answers_move_to_the_prompt_of_the_next_one(load, tokenizer):
    rows = [{"prompt": f"Say {i}", "completion": f"answer {i}", "label": True} for i in range(3)]
    moved = mismatched(list(load("kto", *rows)))
    assert [answer(document, tokenizer) for document in moved] == [f"answer {i}<|im_end|>" for i in (2, 0, 1)]
    assert ["Say 0" in tokenizer.decode(moved[0].ids), "answer 2" in tokenizer.decode(moved[0].ids)] == [True, True]


def first_answers(tokenizer, tmp_path, *rows: dict) -> list[str]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(train=[SourceConfig(path=str(tmp_path / "rows.jsonl"))], cache=str(tmp_path / "cache"))
    preparation = Preparation(cfg, ChatTemplate(tokenizer), objective="kto")
    [source] = load_data(preparation).train
    return [chat.messages[-1].content for chat in first_conversations(source, preparation, 3)]


def test_only_good_answers_are_expected_of_a_model(tokenizer, tmp_path):
    rows = [{"prompt": "q", "completion": f"a{i}", "label": i % 2 == 0} for i in range(4)]
    assert first_answers(tokenizer, tmp_path, *rows) == ["a0", "a2"]
    assert first_answers(tokenizer, tmp_path, PAIR) == ["4"]
    with pytest.raises(DataError, match=r"rows\.jsonl: every label is false"):
        first_answers(tokenizer, tmp_path, rows[1], rows[3])


SINGLE, JUDGED = {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a", "label": False}


@pytest.mark.parametrize(
    ("objective", "rows", "serves"),
    [
        *((objective, [PAIR | {"rejected": ""}, PAIR], True) for objective in ("dpo", "kto")),
        *((objective, [PAIR], False) for objective in ("none", "reward")),
        *((objective, [SINGLE], objective in ("none", "reward")) for objective in ("none", "reward", "simpo", "kto")),
        *((objective, [SINGLE, JUDGED], objective != "dpo") for objective in ("none", "dpo", "kto")),
        ("kto", [{"text": "words", "label": True}], False),
        ("dpo", ["no row", "no row"], True),
    ],
)
def test_only_rows_that_no_objective_like_this_can_use_are_refused_early(tmp_path, objective, rows, serves):
    """One bad row is no reason: it is named with its line later, and may be skipped."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.nullcontext() if serves else pytest.raises(DataError, match=r"rows\.jsonl: "):
        check_source(SourceConfig(path=str(tmp_path / "rows.jsonl")), objective)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not on this machine")
@pytest.mark.parametrize(("file", "objective"), [("dpo_en_demo.json", "dpo"), ("kto_en_demo.json", "kto")])
def test_real_rows_are_read(tokenizer, tmp_path, file, objective):
    cfg = DataConfig(train=[SourceConfig(path=str(REAL / file))], max_length=100_000, cache=str(tmp_path))
    documents = load_data(Preparation(cfg, ChatTemplate(tokenizer), objective=objective)).documents
    assert len(documents) == 300
    sides = [document.sides for document in documents]
    assert all(any(pair) for pair in sides)
    if objective == "dpo":
        assert all(None not in pair for pair in sides)


def test_a_model_is_scored_on_chosen_and_good_answers(load, tokenizer):
    [pair] = load("dpo", PAIR)
    [chosen] = load("answers", PAIR)
    assert chosen.ids.tolist() == pair.sides[0].ids.tolist() and chosen.chosen_tokens is None
    assert answer(chosen, tokenizer) == "4<|im_end|>"
    rows = [{"messages": [*TALK, SAID], "label": good} for good in (True, False)]
    [good] = load("answers", *rows, on_bad_row="skip", max_bad_share=0.9)
    assert answer(good, tokenizer) == "4<|im_end|>"
    plain = {"prompt": "Two plus two?", "completion": "4"}
    assert load("answers", plain)[0].ids.tolist() == load("none", plain)[0].ids.tolist()


def test_scoring_holds_out_the_rows_that_training_does(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{**PAIR, "prompt": f"{i} plus two?"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=[SourceConfig(path=str(file))], cache=str(tmp_path / "cache"), held_out=0.2)
    held_out = [
        load_data(Preparation(data, ChatTemplate(tokenizer), objective=objective)).eval[0].rows.tolist()
        for objective in ("dpo", "answers")
    ]
    assert held_out[0] == held_out[1] and 0 < len(held_out[0]) < 40
