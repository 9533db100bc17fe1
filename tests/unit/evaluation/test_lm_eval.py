"""Tasks of lm-evaluation-harness on a model in memory: its scores are what counting by hand gives."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.config.command_options import EvalOptions
from finetune.config.schema import ModelConfig, QuantConfig
from finetune.data.formats.messages import Conversation, Message
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.gap_table import TaskFigures
from finetune.evaluation.generation import answer_rows
from finetune.evaluation.lm_eval import load_tasks, run_tasks
from finetune.models.adapters.files import load_adapter
from finetune.models.fused import fuse_layers
from finetune.models.load import load_base
from finetune.models.tokenizer import load_tokenizer
from finetune.system.errors import ConfigError, FinetuneError, MissingExtra
from tests.unit.evaluation.conftest import BASE

pytest.importorskip("lm_eval", reason='needs: pip install "finetune-qlora[eval]"')

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{right}}}}"
"""
FREE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|im_end|>"], do_sample: false, max_gen_toks: 24}}
filter_list:
  - name: first letter
    filter:
      - {{function: regex, regex_pattern: "([a-zA-Z0-9])"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def student(run_folder: Path) -> nn.Module:
    """The quantized base with its adapter, as it is trained: nothing is merged."""
    model = load_adapter(load_base(ModelConfig(name=str(BASE)), QuantConfig(), "cpu"), run_folder)
    fuse_layers(model)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ModelConfig(name=str(BASE)))


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., str]:
    """Writes a task with its rows beside it; returns its YAML file."""

    def task(text: str, rows: Iterable[dict[str, Any]], name: str = "local") -> str:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(text.format(name=name, rows=file))
        return str(tmp_path / f"{name}.yaml")

    return task


def scores(model: nn.Module, tokenizer: Any, file: str, as_chat: bool = True, **limits: Any) -> list[TaskFigures]:
    options = EvalOptions(tasks_as_chat=as_chat, **{"limit": None, "batch_size": 4, **limits})
    return run_tasks(model, tokenizer, load_tasks([file]), options)


@torch.no_grad()
def log_likelihood(model: nn.Module, tokenizer: Any, question: str, option: str, as_chat: bool) -> float:
    """Of an option as the answer, by one forward pass over that row alone."""
    if as_chat:
        turns = [{"role": "user", "content": question}]
        question = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    else:
        option = f" {option}"  # the harness's delimiter between a question and its answer
    asked = tokenizer(question, add_special_tokens=False).input_ids
    whole = tokenizer(question + option, add_special_tokens=False).input_ids
    log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    places = range(len(asked), len(whole))
    return float(sum(log_probs[i - 1, whole[i]] for i in places))


def counted(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]], as_chat: bool) -> int:
    right = 0
    for row in rows:
        found = [log_likelihood(model, tokenizer, row["question"], option, as_chat) for option in row["options"]]
        right += max(range(len(found)), key=found.__getitem__) == row["right"]
    return right


def first_letters(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]]) -> int:
    turns = [Conversation((Message("user", row["question"]), Message("assistant", "?"))) for row in rows]
    answers = answer_rows(model, tokenizer, ChatTemplate(tokenizer), turns, max_new_tokens=24, batch_size=1)
    found = [re.search("([a-zA-Z0-9])", answer.given) for answer in answers]
    return sum(one is not None and one[1] == row["answer"] for one, row in zip(found, rows, strict=True))


def chosen(questions: list[str]) -> list[dict[str, Any]]:
    options = ["red", "blue", "seven lamps", "yes"]
    return [{"question": text, "options": options, "right": i % 4} for i, text in enumerate(questions)]


@pytest.mark.parametrize("as_chat", [True, False])
def test_choices_are_counted_as_by_hand(as_chat, student, tokenizer, task, questions):
    rows = chosen(questions)
    right = counted(student, tokenizer, rows, as_chat)
    (accuracy,) = [one for one in scores(student, tokenizer, task(CHOICE, rows), as_chat) if one.metric == "acc"]
    assert 0 < right < len(rows) and (accuracy.task, accuracy.rows) == ("local", len(rows))
    assert accuracy.estimate.value == pytest.approx(right / len(rows))
    assert accuracy.estimate.low < accuracy.estimate.value < accuracy.estimate.high


def test_answers_are_filtered_and_counted_as_by_hand(student, tokenizer, task, questions):
    rows = [{"question": text, "answer": "d" if i % 2 else "y"} for i, text in enumerate(questions)]
    right = first_letters(student, tokenizer, rows)
    (found,) = scores(student, tokenizer, task(FREE, rows))
    assert found.metric == "exact_match (first letter)" and 0 < right < len(rows)
    assert found.estimate.value == pytest.approx(right / len(rows))


def test_gsm8k_from_a_local_file_scores_as_by_hand(shared, student, tokenizer, task):
    """Real questions, which so small a model cannot solve: four numbers to choose from, and its answers' first sign."""
    lines = [json.loads(line) for line in (shared / "datasets" / "gsm8k" / "test.jsonl").open(encoding="utf-8")][:16]
    rows = []
    for i, line in enumerate(lines):
        result = int(line["answer"].rpartition("#### ")[2].replace(",", ""))
        options = [str(result + (k - i % 4) * 7) for k in range(4)]
        rows.append({**line, "options": options, "right": i % 4, "answer": str(result)[0]})
    (accuracy,) = [one for one in scores(student, tokenizer, task(CHOICE, rows, "gsm8k")) if one.metric == "acc"]
    right = counted(student, tokenizer, rows, as_chat=True)
    assert 0 < right < len(rows) and accuracy.estimate.value == pytest.approx(right / len(rows))
    (free,) = scores(student, tokenizer, task(FREE, rows, "gsm8k_free"))
    assert free.estimate.value == pytest.approx(first_letters(student, tokenizer, rows) / len(rows))


def test_the_first_rows_alone_are_what_a_limit_leaves(student, tokenizer, task, questions):
    rows = chosen(questions)
    found = scores(student, tokenizer, task(CHOICE, rows), limit=3, batch_size=1)
    assert {one.rows for one in found} == {3}
    assert found[0].estimate.value == pytest.approx(counted(student, tokenizer, rows[:3], True) / 3)


def test_tasks_and_rows_stand_in_one_table_and_nothing_is_merged(run_folder, measure, task, questions, monkeypatch):
    monkeypatch.setattr("finetune.export.merge.merge.merge", lambda *_, **__: pytest.fail("merged"))
    file = task(CHOICE, chosen(questions))
    found = measure(f"adapter={run_folder}", f"tasks=[{file}]", "variants=[base,trained]", "limit=4", "answers=0")
    assert [len(model.tasks) for model in found.models] == [2, 2] and all(model.sets for model in found.models)
    alone = measure(f"adapter={run_folder}", f"tasks=[{file}]", "variants=[trained]", "limit=4", "data=[]")
    assert alone.models[0].sets == [] and alone.models[0].tasks == found.models[1].tasks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{rows}", "nowhere.jsonl"), "cannot be loaded: FileNotFoundError"),
        (("multiple_choice", "essay"), "cannot be loaded: ValueError: Got invalid output_type 'essay'"),
        (('"{{{{question}}}}"', '"{{{{nothing}}}}"'), "'nothing' is undefined"),
    ],
)
def test_an_invalid_task_is_refused_before_a_model_is_loaded(change, message, task, questions):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_tasks([task(CHOICE.replace(*change), chosen(questions))])


def test_a_metric_unknown_to_the_harness_is_reported_with_its_task(student, tokenizer, task, questions):
    rows = [{"question": text, "answer": "a"} for text in questions[:2]]
    file = task(FREE.replace("metric: exact_match", "metric: nosuch"), rows)
    with pytest.raises(FinetuneError, match=r"fails on local: .*\nhelp: "):
        scores(student, tokenizer, file)


def test_without_the_harness_its_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingExtra, match=r"finetune-qlora\[eval\]"):
        load_tasks(["gsm8k"])
