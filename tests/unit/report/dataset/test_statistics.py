"""Every statistic of the report, on rows of tokens with known numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from finetune.config.schema import RunConfig
from finetune.data.documents import evenly_spaced
from finetune.data.loader import LoadedData, load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.report.dataset.advice import advise
from finetune.report.dataset.statistics import Bin, Extreme, Report, build_report, length_bins, parts_of
from finetune.report.dataset.terminal import sparkline
from finetune.system.resources import packaged

# ids, and how many of their last tokens are targets: 3, 5, 9, 9 and 20 tokens.
A = [([1, 2, 3], 2), ([1, 2, 3, 4, 5], 1), (list(range(9)), 9), (list(range(9)), 9), (list(range(20)), 20)]
B = [([1, 2, 3], 2), ([7, 7, 7, 7], 1)]
HELD = [([1, 2, 3, 4, 5], 1), ([9, 9], 1)]


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5"))


def write(file: Path, rows: list[tuple[list[int], int]]) -> str:
    lines = [{"input_ids": ids, "labels": [-100] * (len(ids) - n) + ids[len(ids) - n :]} for ids, n in rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def config(folder: Path, **data) -> RunConfig:
    """Two training sources, the second with weight 2, and rows to evaluate with; sequences of 10 tokens."""
    train = [
        {"path": write(folder / "a.jsonl", A)},
        {"path": write(folder / "b.jsonl", B), "weight": 2.0},
    ]
    settings = {"train": train, "eval": [{"path": write(folder / "e.jsonl", HELD)}], "max_length": 10} | data
    run = {"name": "run", "model": {"name": "base"}, "train": {"batch_size": 2, "epochs": 2}, "data": settings}
    return RunConfig.model_validate(run)


def report_of(cfg: RunConfig, chat: ChatTemplate) -> tuple[Report, LoadedData]:
    data = load_data(Preparation(cfg.data, chat))
    return build_report(data, cfg, chat), data


def test_every_source_has_its_statistics(tmp_path, chat):
    report, _ = report_of(config(tmp_path), chat)
    a, b, held = report.parts
    assert [(p.section, p.name, p.format) for p in report.parts] == [
        ("train", "a", "tokens"),
        ("train", "b", "tokens"),
        ("eval", "e", "tokens"),
    ]
    assert (a.figures.rows, a.figures.tokens, a.figures.targets) == (5, 46, 2 + 1 + 8 + 8 + 19)
    assert a.figures.target_share == 38 / 46
    assert (a.figures.documents, a.figures.kept_tokens, a.figures.too_long) == (4, 26, 1)
    assert a.figures.left_out == {"longer than 10 tokens": 1}
    assert (a.figures.duplicates, a.figures.shared) == (1, (("b", 1),))
    assert (b.figures.rows, b.figures.tokens, b.figures.targets, b.figures.duplicates) == (2, 7, 3, 0)
    assert b.figures.shared == (("a", 1),) and b.weight == 2 and not b.figures.left_out
    assert held.figures.shared == (("a", 1),)
    lengths = a.figures.lengths
    assert lengths.shortest == Extreme(3, f"{tmp_path}/a.jsonl:1")
    assert lengths.longest == Extreme(20, f"{tmp_path}/a.jsonl:5")
    assert (lengths.median, lengths.most) == (9, 20)


def test_the_total_is_of_all_training_rows(tmp_path, chat):
    total = report_of(config(tmp_path), chat)[0].training
    assert (total.rows, total.tokens, total.targets) == (7, 53, 41)
    assert (total.documents, total.kept_tokens, total.too_long) == (6, 33, 1)
    assert total.duplicates == 2  # within a, and across a and b
    assert total.lengths.median == 5 and total.lengths.longest.tokens == 20
    assert sum(item.rows for item in total.lengths.bins) == 7


def test_an_epoch_is_counted_as_it_will_be_packed(tmp_path, chat):
    """9, 9, 5, 3 once and 3, 4 twice into sequences of 10: 9 | 9 | 5 4 | 4 3 3 | 3."""
    order = report_of(config(tmp_path), chat)[0].order
    assert (order.sequences, order.tokens, order.steps, order.total_steps) == (5, 40, 3, 6)
    assert order.fill == 40 / 50
    unpacked = report_of(config(tmp_path, packing=False), chat)[0].order
    assert (unpacked.sequences, unpacked.steps, unpacked.fill) == (8, 4, None)


def test_median_and_95th_percentile_of_lengths(tmp_path, chat):
    rows = [(list(range(n)), 1) for n in range(2, 102)]
    cfg = config(tmp_path, train=[{"path": write(tmp_path / "many.jsonl", rows)}], eval=[], max_length=101)
    lengths = report_of(cfg, chat)[0].training.lengths
    assert (lengths.median, lengths.most, lengths.longest.tokens) == (51, 96, 101)


def test_a_row_of_max_length_is_not_too_long_and_rows_left_out_are_no_duplicates(tmp_path, chat):
    rows = [(list(range(10)), 1), (list(range(11)), 1), (list(range(11)), 1)]
    cfg = config(tmp_path, eval=[{"path": write(tmp_path / "long.jsonl", rows)}])
    write(tmp_path / "a.jsonl", rows)
    report, _ = report_of(cfg, chat)
    figures = report.parts[0].figures
    assert (figures.too_long, figures.duplicates, report.training.duplicates) == (2, 0, 0)
    assert report.parts[2].figures.shared == (("a", 1),)


@pytest.mark.parametrize(("policy", "kept", "documents"), [("left", 36, 5), ("right", 36, 5), ("split", 46, 6)])
def test_truncated_tokens_and_documents_are_counted(tmp_path, chat, policy, kept, documents):
    figures = report_of(config(tmp_path, truncation=policy), chat)[0].parts[0].figures
    assert (figures.kept_tokens, figures.documents, figures.too_long) == (kept, documents, 1)
    assert figures.tokens == 46 and not figures.left_out


def test_rows_that_lost_their_targets_and_bad_rows_are_left_out_by_reason(tmp_path, chat):
    cfg = config(tmp_path, truncation="right", on_bad_row="skip", max_bad_share=0.5)
    lines = [{"input_ids": [1] * 20, "labels": [-100] * 19 + [1]}, {"input_ids": "x"}, {"input_ids": [1, 2]}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    part = report_of(cfg, chat)[0].parts[1]
    assert part.figures.left_out == {"bad rows": 1, "no target left within 10 tokens": 1}
    assert part.figures.rows == 2 and "b.jsonl:2" in Path(part.bad_rows).read_text()


def test_held_out_rows_are_a_part_of_their_own_and_every_row_is_on_one_side(tmp_path, chat):
    rows = [([i, i + 1, i + 2], 2) for i in range(200)]
    source = {"path": write(tmp_path / "rows.jsonl", rows)}
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{broken\n")
    cfg = config(tmp_path, held_out=0.25, train=[source], eval=[], on_bad_row="skip")
    report, data = report_of(cfg, chat)
    train, held = report.parts
    assert (train.figures.left_out, held.figures.left_out) == ({"bad rows": 1}, {})
    assert (train.section, held.section, held.name) == ("train", "held out", "held_out")
    assert train.figures.rows + held.figures.rows == 200 and 20 < held.figures.rows < 80
    one, other = (set(part.rows.tolist()) for part in parts_of(data, 0.25))
    assert not one & other and len(one | other) == 200
    assert report.training.rows == train.figures.rows and not held.figures.shared


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(2, 5000))
def test_the_histogram_holds_every_row_and_breaks_at_the_limit(lengths: list[int], limit: int):
    bins = length_bins(np.array(lengths), limit)
    assert sum(item.rows for item in bins) == len(lengths)
    for item in bins:
        assert item.rows == sum(item.first <= length <= item.last for length in lengths)
        assert not item.first <= limit < item.last
    assert all(left.last + 1 == right.first for left, right in pairwise(bins))
    assert bins[0].rows and bins[-1].rows


def test_the_histogram_of_known_lengths():
    found = length_bins(np.array([3, 5, 6, 13, 13]), 10)
    assert found == (Bin(3, 3, 1), Bin(4, 4, 0), Bin(5, 6, 2), Bin(7, 10, 0), Bin(11, 16, 2))


@given(st.integers(1, 3000), st.integers(1, 50))
def test_shown_rows_are_evenly_spaced(count: int, wanted: int):
    picked = evenly_spaced(count, wanted)
    assert len(picked) == len(set(picked)) == min(count, wanted) and picked == sorted(picked)
    assert picked[0] == 0 and (picked[-1] == count - 1 or wanted == 1)
    gaps = np.diff(picked)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_control_tokens_in_texts_are_counted_with_their_first_place(tmp_path, chat):
    texts = ["plain", "a <|im_end|> b <|im_start|>", "<|im_end|>"]
    lines = [{"prompt": text, "completion": "x"} for text in texts]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = config(tmp_path, train=[{"path": str(tmp_path / "c.jsonl")}], max_length=500)
    report, _ = report_of(cfg, chat)
    figures = report.parts[0].figures
    assert (figures.control_tokens, figures.control_rows) == (3, 2)
    assert figures.control_place == f"{tmp_path}/c.jsonl:2"
    assert report.ends == (("a turn", "<|im_end|>"),)


def test_a_line_draws_a_histogram_with_the_limit_in_it():
    bins = [Bin(3, 4, 8), Bin(5, 6, 0), Bin(7, 10, 1), Bin(11, 16, 4)]
    assert sparkline(bins, 10) == "3 █ ▁│▄ 16 tokens"
    assert sparkline(bins, 16) == "3 █ ▁▄ 16 tokens" == sparkline(bins, 2)


def advice(report: Report, cfg: RunConfig, end_token: str | None = None) -> str:
    return "\n".join(f"{item.level}: {item.text}" for item in advise(report, cfg, end_token))


def test_leaks_come_first_with_their_source(tmp_path, chat):
    cfg = config(tmp_path)
    report, _ = report_of(cfg, chat)
    first, *others = advise(report, cfg, None)
    assert first.level == "leak" and first.text.startswith("e: 1 of 2 rows are also training rows of a")
    assert all(item.level == "look" for item in others)


def test_warnings_hold_their_numbers(tmp_path, chat):
    cfg = config(tmp_path)
    report, _ = report_of(cfg, chat)
    found = advice(report, cfg)
    assert "data.max_length=10: 1 row (14.3%) longer and left out, with 20 tokens" in found
    assert "duplicates: 2 of 7 rows (28.6%)" in found
    few = replace(report.parts[0].figures, targets=1, tokens=1000)
    found = advice(replace(report, parts=(replace(report.parts[0], figures=few),)), cfg)
    assert "a: only 0.10% of the tokens are targets" in found
    loose = replace(report.order, fill=0.7, sequences=10)
    assert "packed sequences are 70% full" in advice(replace(report, order=loose), cfg)
    assert "one step" not in found
    small = advice(replace(report, order=replace(report.order, sequences=1)), cfg)
    assert "train.batch_size=2" in small and "1 sequences" in small and "data.packing=false" in small


def test_good_data_get_no_advice(tmp_path, chat):
    cfg = config(tmp_path, train=[{"path": write(tmp_path / "good.jsonl", [([i, i, i, i], 3) for i in range(8)])}])
    report, _ = report_of(cfg, chat)
    assert advice(report, cfg) == ""


def test_the_end_token_warning_needs_trained_turns(tmp_path, chat):
    cfg = config(tmp_path)
    report, _ = report_of(cfg, chat)
    assert "untrained" not in advice(report, cfg, "untrained end")  # rows of tokens have no turns
    chats = replace(report, parts=(replace(report.parts[0], formats=frozenset({"messages"})),))
    assert "look: untrained end" in advice(chats, cfg, "untrained end")
