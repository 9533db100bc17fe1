"""The columns of widely used datasets have one meaning, or several that are listed as settings."""

from __future__ import annotations

import pytest
import yaml

from finetune.config.schema import SourceConfig
from finetune.data.formats.columns import columns_line, recognize
from finetune.data.formats.detection import resolve_format
from finetune.data.formats.messages import Conversation, Message, RawText
from finetune.data.formats.parser import RowParser
from finetune.system.errors import DataError


def chat(question: str, answer: str, system: str | None = None) -> Conversation:
    first = () if system is None else (Message("system", system),)
    return Conversation((*first, Message("user", question), Message("assistant", answer)))


# (row, example), by dataset
DATASETS = {
    "GSM8K": ({"question": "q", "answer": "a"}, chat("q", "a")),
    "GPT4All": ({"prompt": "q", "response": "a", "source": "x"}, chat("q", "a")),
    "Dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, chat("q\nc", "a")),
    "Dolly without context": ({"instruction": "q", "context": "", "response": "a"}, chat("q", "a")),
    "Magicoder": ({"instruction": "q", "response": "a"}, chat("q", "a")),
    "Firefly": ({"kind": "x", "input": "q", "target": "a"}, chat("q", "a")),
    "pairs": ({"input": "q", "output": "a"}, chat("q", "a")),
    "FLAN": ({"inputs": "q", "targets": "a", "task": "x"}, chat("q", "a")),
    "natural-instructions": ({"definition": "q", "inputs": "c", "targets": "a"}, chat("q\nc", "a")),
    "OIG": ({"INSTRUCTION": "q", "RESPONSE": "a", "SOURCE": "x"}, chat("q", "a")),
    "capitals": ({"Instruction": "q", "Input": "", "Response": "a"}, chat("q", "a")),
    "blanks": ({" instruction": "q", "output ": "a"}, chat("q", "a")),
    "MetaMathQA": ({"query": "q", "response": "a", "type": "x", "original_question": "o"}, chat("q", "a")),
    "MATH": ({"problem": "q", "solution": "a", "level": "x", "type": "y"}, chat("q", "a")),
    "OpenOrca": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, chat("q", "a", "s")),
    "CodeFeedback": ({"query": "q", "answer": "a", "lang": "x"}, chat("q", "a")),
    "sql-create-context": ({"question": "q", "context": "c", "answer": "a"}, chat("q\nc", "a")),
    "synthetic_text_to_sql": ({"sql_prompt": "q", "sql": "a"}, chat("q", "a")),
    "counseling": ({"Context": "q", "Response": "a"}, chat("q", "a")),
    "coedit": ({"task": "x", "src": "q", "tgt": "a"}, chat("q", "a")),
    "SAMSum": ({"id": "1", "dialogue": "q", "summary": "a"}, chat("q", "a")),
    "CNN/DailyMail": ({"article": "q", "highlights": "a"}, chat("q", "a")),
    "CAMEL": ({"message_1": "q", "message_2": "a", "topic": "x"}, chat("q", "a")),
    "TruthfulQA": ({"question": "q", "best_answer": "a", "correct_answers": ["b"]}, chat("q", "a")),
    "letters": ({"Q": "q", "A": "a"}, chat("q", "a")),
    "speakers": ({"user": "q", "assistant": "a"}, chat("q", "a")),
    "camel case": ({"systemPrompt": "s", "userInput": "q", "Model Response": "a"}, chat("q", "a", "s")),
    "dialog": ({"dialog": [{"role": "user", "content": "q"}, {"role": "AI", "content": "a"}]}, chat("q", "a")),
    "LangChain": ({"page_content": "d", "metadata": {}}, RawText("d")),
    "Text": ({"Text": "d"}, RawText("d")),
}


def parser_of(row, **settings) -> RowParser:
    source = SourceConfig(path="rows.jsonl", **settings)
    return RowParser(source, resolve_format(source, row, "rows.jsonl"))


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_dataset_is_read_and_the_setting_of_its_reading_says_the_same(dataset):
    row, example = DATASETS[dataset]
    assert parser_of(row).parse(row) == example
    [reading] = recognize(frozenset(row))
    pasted = yaml.safe_load(columns_line(reading.columns))
    assert pasted == {"columns": reading.columns}
    assert parser_of(row, **pasted).parse(row) == example


def test_the_reading_is_printed_once_with_the_ignored_columns(capsys):
    row = {"question": "q", "answer": "a", "printed_once": 1}
    for _ in range(2):
        parser_of(row)
    printed = capsys.readouterr().err.splitlines()
    assert printed == ["rows.jsonl: read with columns: {prompt: question, completion: answer}; ignored: printed_once"]


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"problem": "q", "solution": "s", "answer": "a"}, {"s", "a"}),
        ({"prompt": "q", "response": "s", "output": "a"}, {"s", "a"}),
        ({"Answer": "s", "answer": "a", "question": "q"}, {"s", "a"}),
        ({"instruction": "q", "response": "s", "answer": "a", "context": "c"}, {"s", "a"}),
    ],
)
def test_columns_with_two_meanings_are_an_error_whose_lines_can_be_pasted(row, answers):
    with pytest.raises(DataError) as error:
        parser_of(row)
    lines = [line.strip() for line in str(error.value).splitlines() if line.strip().startswith("columns:")]
    assert {parser_of(row, **yaml.safe_load(line)).parse(row).messages[-1].content for line in lines} == answers


def test_every_row_is_read_by_its_own_columns():
    parser = parser_of({"instruction": "q", "response": "a"})
    assert parser.parse({"instruction": "q", "Input": "c", "response": "a"}) == chat("q\nc", "a")
    assert parser.parse({"instruction": "q", "output": "a"}) == chat("q", "a")
    for other in ({"text": "d"}, {"instruction": "q", "response": "a", "answer": "b"}):
        with pytest.raises(DataError, match="lacks"):
            parser.parse(other)


def test_our_own_names_win_over_the_table():
    row = {"prompt": "q", "completion": "a", "response": "b", "system_prompt": "s"}
    assert parser_of(row).parse(row) == chat("q", "a")
    row = {"text": "d", "question": "q", "answer": "a"}
    assert parser_of(row).parse(row) == RawText("d")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"custom_id": "1", "body": {"messages": []}},
            ["finetune data convert path=rows.jsonl answers="],
        ),
        ({"id": "1", "custom_id": "1", "response": {}, "error": None}, ["answers=rows.jsonl out="]),
        ({"mine": {"file_name": "a.json"}}, ["finetune migrate rows.jsonl out=", "data.train=a.json"]),
        ({"a": {"hf_hub_url": "b/c"}, "d": {"file_name": "e.json"}}, ["(a, d)", "data.train=b/c"]),
        ({"instruction": {"0": "x"}, "output": {"0": "y"}}, ["by columns", "help: python -c "]),
        ({"instruction": ["x", "z"], "output": ["y", "z"]}, ["by columns", "help: python -c "]),
    ],
)
def test_files_of_other_tools_are_named_with_a_command(row, words):
    with pytest.raises(DataError) as error:
        parser_of(row)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_column_about_a_file_is_no_list_of_datasets():
    row = {"prompt": "q", "completion": "a", "meta": {"file_name": "x.pdf", "0": "x"}, "tags": ["x"]}
    assert parser_of(row).parse(row) == chat("q", "a")


def test_a_name_that_yaml_reads_as_another_type_is_quoted():
    for name in ("no", "null", " x", 'a"b', "1", "\x1b"):
        assert yaml.safe_load(columns_line({"prompt": name})) == {"columns": {"prompt": name}}
