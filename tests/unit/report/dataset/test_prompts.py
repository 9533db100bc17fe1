"""Prompts of runs with rewards: what `finetune data` counts, shows and warns about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.config.schema import RunConfig
from finetune.data.formats.messages import Message
from finetune.data.loader import load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.report.dataset.advice import advise
from finetune.report.dataset.statistics import Report, build_report
from finetune.report.dataset.terminal import describe_part
from finetune.system.resources import packaged


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5"))


def report_of(
    file: Path, chat: ChatTemplate, answers: dict[str, str], max_length: int, **reward
) -> tuple[Report, RunConfig]:
    """Report on rows of one file; answers: to each prompt."""
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in answers.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [{"path": str(file)}], "max_length": max_length}
    settings = {"model": {"name": "base"}, "train": {"batch_size": 2, "epochs": 3}, "data": data, "reward": reward}
    cfg = RunConfig.model_validate({"name": "run", **settings})
    loaded = load_data(Preparation(cfg.data, chat, objective=cfg.row_objective))
    return build_report(loaded, cfg, chat), cfg


def prompt_tokens(chat: ChatTemplate, prompt: str) -> int:
    return len(chat.prompt_ids([Message("user", prompt)]))


GRPO = {"loss": "grpo", "functions": {"exact": 1}, "max_new_tokens": 20}
SHORT, LONG = "one two", "one two three four five six seven eight"


@pytest.mark.parametrize(("more", "left_out"), [(0, 0), (-1, 1)])
def test_prompts_without_room_for_an_answer_are_counted_with_the_length_that_mends_it(tmp_path, chat, more, left_out):
    longest = prompt_tokens(chat, LONG)
    answers = {SHORT: "red", LONG: "blue", "one two three": "a b c"}
    report, cfg = report_of(tmp_path / "rows.jsonl", chat, answers, longest + 20 + more, **GRPO)
    found = report.prompts
    assert found is not None and found == report.parts[0].prompts
    assert (found.rows, found.no_room, found.longest) == (3, left_out, longest)
    assert found.median == prompt_tokens(chat, "one two three")
    texts = [item.text for item in advise(report, cfg, None) if item.text.startswith("prompts: ")]
    assert len(texts) == left_out and all(f"data.max_length={longest + 20}," in text for text in texts)


def test_rows_without_an_expected_answer_are_counted(tmp_path, chat):
    answers = {"one": "red", "two": " ", "three": "x"}
    report, cfg = report_of(tmp_path / "rows.jsonl", chat, answers, 100, **GRPO)
    assert report.prompts is not None and report.prompts.unanswered == 1
    assert describe_part(report.parts[0])["expected"] == "in 2 of 3 rows"
    assert any("missing in 1 row of 3" in item.text for item in advise(report, cfg, None))


def test_an_epoch_has_a_sequence_for_each_prompt_with_room_and_its_updates(tmp_path, chat):
    answers = {**{f"{word}": "a" for word in "abcde"}, LONG: "b"}
    length = prompt_tokens(chat, LONG) + 19
    report, _ = report_of(tmp_path / "rows.jsonl", chat, answers, length, **GRPO, updates=4)
    order = report.order
    assert (order.sequences, order.steps, order.total_steps, order.fill) == (5, 3 * 4, 9 * 4, None)


def test_a_run_without_rewards_has_no_such_statistics_and_packs(tmp_path, chat):
    report, _ = report_of(tmp_path / "rows.jsonl", chat, {"a": "b", "c": "d"}, 200)
    assert report.prompts is None and report.parts[0].prompts is None
    assert report.order.sequences == 1 and report.order.fill is not None
