"""Pairs and labels: what `finetune data` counts, shows and warns about."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.config.schema import RunConfig
from finetune.data.loader import LoadedData, load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.report.dataset.advice import advise
from finetune.report.dataset.examples import Decoder, marked, shown_rows
from finetune.report.dataset.preferences import PreferenceFigures, describe_preferences
from finetune.report.dataset.statistics import Report, build_report
from finetune.system.resources import packaged


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5")


@pytest.fixture(scope="module")
def chat(tokenizer) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def pair(chosen: str, rejected: str) -> dict:
    return {"prompt": "A question?", "chosen": chosen, "rejected": rejected}


def labeled(answer: str, label: bool) -> dict:
    return {"prompt": "A question?", "completion": answer, "label": label}


def report_of(file: Path, chat: ChatTemplate, rows: list[dict], **preference) -> tuple[Report, LoadedData, RunConfig]:
    """Report on rows of one file for a run with preferences."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [{"path": str(file)}], "max_length": 200, "on_bad_row": "skip", "max_bad_share": 0.9}
    settings = {"model": {"name": "base"}, "train": {"batch_size": 2}, "data": data, "preference": preference}
    cfg = RunConfig.model_validate({"name": "run", **settings})
    loaded = load_data(Preparation(cfg.data, chat, objective=cfg.preference.objective))
    return build_report(loaded, cfg, chat), loaded, cfg


def figures_of(file: Path, chat: ChatTemplate, rows: list[dict], **preference) -> PreferenceFigures:
    report = report_of(file, chat, rows, **preference)[0]
    assert report.preferences is not None and report.preferences == report.parts[0].preferences
    return report.preferences


def texts(report: Report, cfg: RunConfig) -> str:
    return "\n".join(item.text for item in advise(report, cfg, None) if "packed" not in item.text)


def test_pairs_are_counted_with_the_lengths_of_their_answers(tmp_path, chat):
    rows = [pair("one two three", "four"), pair("four", "one two three"), pair("one two three", "two"), pair("a", "b")]
    found = figures_of(tmp_path / "rows.jsonl", chat, rows, objective="dpo")
    tokens = [[len(chat.encode_texts([row[side]])[0]) + 1 for row in rows] for side in ("chosen", "rejected")]
    longer = sum(chosen > rejected for chosen, rejected in zip(*tokens, strict=True))
    assert 0 < longer < 4
    assert (found.pairs, found.good, found.bad, found.chosen_longer) == (4, 4, 4, longer)
    assert (found.good_tokens, found.bad_tokens) == (sum(tokens[0]), sum(tokens[1]))
    assert found.mean_tokens == (sum(tokens[0]) / 4, sum(tokens[1]) / 4)
    assert (found.equal, found.prefixes) == (0, 0)


@pytest.mark.parametrize(
    ("chosen", "rejected", "counted"),
    [
        ("The answer is Paris.", "The answer is Paris. It lies in France.", True),
        ("The answer is Par", "The answer is Paris, in France.", True),  # the last word has other tokens
        ("The answer is Paris.", "The answer is London.", False),
        ("Paris. The answer is this.", "The answer is Paris. The answer is this.", False),
    ],
)
def test_pairs_with_a_common_beginning_are_counted(tmp_path, chat, chosen, rejected, counted):
    for sides in ((chosen, rejected), (rejected, chosen)):
        assert figures_of(tmp_path / "rows.jsonl", chat, [pair(*sides)], objective="dpo").prefixes == counted


def test_equal_pairs_are_counted_in_every_form_of_a_pair(tmp_path, chat):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "same"}]
    rows = [pair("x", "y"), pair("x", "x"), {"chosen": turns, "rejected": turns}, {"prompt": "no answers"}]
    report, _, cfg = report_of(tmp_path / "rows.jsonl", chat, rows, objective="dpo")
    assert report.preferences is not None
    assert (report.preferences.pairs, report.preferences.equal) == (1, 2)
    assert report.parts[0].figures.left_out == {"bad rows": 3}
    assert "equal pairs: 2 rows" in texts(report, cfg)


def test_rows_without_preferences_have_no_such_statistics(tmp_path, chat):
    rows = [{"prompt": "q", "completion": "a"}]
    report = report_of(tmp_path / "rows.jsonl", chat, rows)[0]
    assert report.preferences is None and report.parts[0].preferences is None


@pytest.mark.parametrize(("longer", "warned"), [(8, False), (9, True)])
def test_a_bias_of_length_is_a_warning_above_80_percent(tmp_path, chat, longer, warned):
    rows = [pair(f"one two three {i}", f"{i}") for i in range(longer)]
    rows += [pair(f"{i}", f"one two three {i}") for i in range(10 - longer)]
    report, _, cfg = report_of(tmp_path / "rows.jsonl", chat, rows, objective="dpo")
    assert ("length: the chosen answer is longer in 90% of the pairs" in texts(report, cfg)) == warned


@pytest.mark.parametrize(
    ("good", "bad", "weights"), [(9, 3, (1, 3)), (2, 8, (4, 1)), (4, 4, None), (4, 3, None), (3, 4, (1.33, 1))]
)
def test_kto_gets_weights_that_balance_its_labels(tmp_path, chat, good, bad, weights):
    rows = [labeled(f"good {i}", True) for i in range(good)] + [labeled(f"bad {i}", False) for i in range(bad)]
    report, _, cfg = report_of(tmp_path / "rows.jsonl", chat, rows, objective="kto")
    found = report.preferences
    assert found is not None and (found.good, found.bad, found.pairs) == (good, bad, 0)
    assert describe_preferences(found)["labels"] == f"{good} good answers, {bad} bad answers"
    if weights is None:
        assert "labels:" not in texts(report, cfg)
        return
    keys = ("desirable_weight", "undesirable_weight")
    assert " ".join(f"preference.{key}={weight}" for key, weight in zip(keys, weights, strict=True)) in texts(
        report, cfg
    )
    settings = cfg.preference.model_copy(update=dict(zip(keys, weights, strict=True)))
    balanced = cfg.model_copy(update={"preference": settings})
    assert "labels:" not in texts(report, balanced)


@pytest.mark.parametrize(("label", "missing"), [(True, "bad"), (False, "good")])
def test_kto_with_one_label_is_a_warning(tmp_path, chat, label, missing):
    rows = [labeled(f"answer {i}", label) for i in range(4)]
    report, _, cfg = report_of(tmp_path / "rows.jsonl", chat, rows, objective="kto")
    text = texts(report, cfg)
    assert "every answer is" in text and f"add {missing} answers" in text and "labels:" not in text
    both = report_of(tmp_path / "both.jsonl", chat, [*rows, pair("x", "y")], objective="kto")[0]
    assert "every answer is" not in texts(replace(both, preferences=None), cfg)


def test_both_sides_of_a_pair_are_shown_with_their_targets(tmp_path, chat, tokenizer):
    data = report_of(tmp_path / "rows.jsonl", chat, [pair("yes", "no"), pair("up", "down")], objective="dpo")[1]
    rows = shown_rows(["rows"], data.documents, Decoder.of(tokenizer), 2)
    for row, document in zip(rows, data.documents, strict=True):
        assert [side.name for side in row.sides] == ["chosen", "rejected"]
        assert (row.tokens, row.targets) == (len(document), document.target_tokens)
    chosen, rejected = (marked(side.spans) for side in rows[0].sides)
    assert chosen.endswith("⟦yes<|im_end|>⟧\n") and rejected.endswith("⟦no<|im_end|>⟧\n")
    assert chosen.count("A question?") == rejected.count("A question?") == 1


def test_a_labeled_answer_is_one_side(tmp_path, chat, tokenizer):
    rows = [labeled("yes", True), labeled("no", False)]
    data = report_of(tmp_path / "rows.jsonl", chat, rows, objective="kto")[1]
    shown = shown_rows(["rows"], data.documents, Decoder.of(tokenizer), 2)
    assert [[side.name for side in row.sides] for row in shown] == [["good"], ["bad"]]
