"""`finetune data` and `finetune data convert`: their options, their output, and their errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.config.schema import SourceConfig
from finetune.data.formats.messages import Conversation
from finetune.data.formats.parser import RowParser
from tests.source_rows import rows_of

CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a config of two training sources and one to evaluate with."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", *(chat(f"{i} + 1?", str(i + 1)) for i in range(20)))
    write(tmp_path / "b.jsonl", {"text": "a document"}, {"text": "another document"})
    write(tmp_path / "e.jsonl", chat("7 + 7?", "14"))
    (tmp_path / "run.yaml").write_text(
        "model: {name: '${packaged:data/tiny-qwen2.5}'}\n"
        "data:\n  train: [{path: a.jsonl}, {path: b.jsonl, name: documents}]\n  eval: [{path: e.jsonl}]\n"
        "train: {batch_size: 1}\n"
    )
    return tmp_path


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(file: Path, *rows: object) -> None:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_report_goes_to_stdout_and_is_plain_without_a_terminal(folder, capsys):
    assert main(["data", "config=run.yaml"]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out and captured.err == ""
    rows = [" ".join(line.split()) for line in captured.out.splitlines()]
    assert any(row.startswith("a 20 ") for row in rows) and any(row.startswith("together 22 ") for row in rows)
    assert "a train, messages rows of a.jsonl" in rows and "documents train, text rows of b.jsonl" in rows
    assert "template: the tokenizer's own; a turn ends with <|im_end|>; a document ends with <|endoftext|>" in rows
    assert rows[-1] == "no warnings"


def test_show_prints_rows_with_their_trained_tokens_marked(folder, capsys):
    assert main(["data", "config=run.yaml", "show=3"]) == 0
    out = capsys.readouterr().out
    assert out.count("── row ") == 3 and "⟦1<|im_end|>⟧" in out and "a.jsonl:1 ·" in out
    assert "b.jsonl:2 ·" in out and "another document<|endoftext|>⟧" in out.replace("⟦", "")


def test_the_dump_holds_every_row_in_order_with_unshifted_labels(folder, capsys):
    assert main(["data", "config=run.yaml", "dump=rows.jsonl", "data.truncation=drop"]) == 0
    dumped = lines(folder / "rows.jsonl")
    assert all(list(row) == ["source", "row", "input_ids", "labels"] for row in dumped)
    places = [(row["source"], row["row"]) for row in dumped]
    assert places == [*(("a.jsonl", i) for i in range(20)), ("documents", 0), ("documents", 1), ("e.jsonl", 0)]
    for row in dumped:
        assert len(row["input_ids"]) == len(row["labels"])
        assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    assert dumped[20]["labels"] == dumped[20]["input_ids"]
    trained = [label for label in dumped[0]["labels"] if label != -100]
    assert len(trained) == 2 and dumped[0]["labels"][-3:-1] == trained  # `1`, <|im_end|>; not the newline
    assert capsys.readouterr().err == "dump: rows.jsonl\n"


def test_the_dump_of_a_pair_says_where_its_rejected_side_begins(folder):
    write(folder / "pairs.jsonl", {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
    settings = ["data.train=[{path: pairs.jsonl}]", "data.eval=[]", "preference.objective=dpo"]
    assert main(["data", "config=run.yaml", "dump=rows.jsonl", *settings]) == 0
    [row] = lines(folder / "rows.jsonl")
    ids, border = row["input_ids"], row["chosen_tokens"]
    assert len(ids) == 2 * border and sum(a != b for a, b in zip(ids[:border], ids[border:], strict=True)) == 1


def test_bad_rows_keep_their_number_and_held_out_rows_are_dumped_too(folder):
    write(folder / "a.jsonl", *(chat(f"{i}?", "x") if i != 3 else "{broken" for i in range(40)))
    settings = ["data.on_bad_row=skip", "data.held_out=0.3", "data.train=[{path: a.jsonl}]", "data.eval=[]"]
    assert main(["data", "config=run.yaml", "dump=rows.jsonl", *settings]) == 0
    rows = [row["row"] for row in lines(folder / "rows.jsonl")]
    assert sorted(rows) == [i for i in range(40) if i != 3] and rows != sorted(rows)


def test_the_report_reads_a_whole_stream(folder, capsys):
    assert main(["data", "config=run.yaml", "data.stream_rows=5", "train.max_steps=4"]) == 0
    out = capsys.readouterr().out
    assert "together" in out and "data.stream_rows=5:" in out


def test_a_row_in_training_and_evaluation_is_reported_as_a_leak(folder, capsys):
    write(folder / "e.jsonl", chat("3 + 1?", "4"))
    assert main(["data", "config=run.yaml"]) == 0
    assert "LEAK  e: 1 of 1 row" in capsys.readouterr().out


def test_the_dump_has_a_label_for_every_trained_token_of_any_weight(folder):
    row = chat("q", "half")
    row["messages"][1]["weight"] = 0.5
    write(folder / "a.jsonl", row, chat("q", "half"))
    settings = ["data.train=[{path: a.jsonl}]", "data.eval=[]"]
    assert main(["data", "config=run.yaml", "dump=rows.jsonl", *settings]) == 0
    weighted, whole = lines(folder / "rows.jsonl")
    assert weighted["labels"] == whole["labels"]


def test_the_dump_holds_truncated_rows_truncated(folder):
    settings = ["data.max_length=30", "data.truncation=right", "data.train=[{path: b.jsonl}]", "data.eval=[]"]
    write(folder / "b.jsonl", {"text": "word " * 200})
    assert main(["data", "config=run.yaml", "dump=rows.jsonl", *settings]) == 0
    assert [len(row["input_ids"]) for row in lines(folder / "rows.jsonl")] == [30]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "config=X.yaml"),
        (["config=run.yaml", "show=abc"], "show: "),
        (["config=run.yaml", "show=-1"], "show: "),
        (["config=run.yaml", "show=²"], "show: "),
        (["config=run.yaml", "shwo=3"], "did you mean show?"),
        (["config=run.yaml", "htm=x"], "did you mean html?"),
        (["config=run.yaml", "zzzz=3"], "zzzz"),
        (["config=none.yaml"], "no config none.yaml"),
        (["run.yaml"], "write config=run.yaml"),
        (["config=run.yaml", "html=none/x.html"], "html=none/x.html: cannot be written: No such file"),
        (["config=run.yaml", "dump=."], "dump=.: is a folder"),
        (["config=run.yaml", "dump="], "dump: "),
        (["config=run.yaml", "html=x", "dump=./x"], "dump=./x: cannot be written"),
        (["config=run.yaml", "html=e.jsonl"], "html=e.jsonl: holds rows"),
        (["config=run.yaml", "dump=./b.jsonl"], "dump=./b.jsonl: holds rows"),
        (["config=run.yaml", "data.train.0.path=none.jsonl"], "none.jsonl"),
    ],
)
def test_wrong_words_are_refused_and_nothing_is_written(folder, capsys, words: list[str], message: str):
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert main(["data", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


SOURCES: dict[str, tuple[list[object], list[str]]] = {
    "messages": ([chat("q", "a"), {**CHAT, "messages": [*CHAT["messages"], *chat("más?", "sí")["messages"]]}], []),
    "weighted": ([{"messages": [*CHAT["messages"][:1], {"role": "assistant", "content": "4", "weight": 0.5}]}], []),
    "alpaca": ([{"instruction": "add", "input": "2, 2", "output": "4", "system": "sum"}], []),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "be kind"}],
        [],
    ),
    "columns": (
        [{"question": "q", "answer": "a"}],
        ["columns={prompt: question, completion: answer}"],
    ),
    "one by one": ([{"question": "q", "answer": "a"}], ["columns.prompt=question", "columns.completion=answer"]),
    "roles": (
        [{"messages": [{"role": "customer", "content": "q"}, {"role": "agent", "content": "a"}]}],
        ["roles={user: customer, assistant: [agent, bot]}"],
    ),
    "tools": (
        [
            {
                "messages": [
                    {"role": "user", "content": "2 + 2?"},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
                    },
                    {"role": "tool", "content": "4"},
                    {"role": "assistant", "content": "Four."},
                ],
                "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
            }
        ],
        [],
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_converted_rows_have_the_same_content(folder, capsys, name: str):
    rows, words = SOURCES[name]
    write(folder / "in.jsonl", *rows)
    assert main(["data", "convert", "path=in.jsonl", "out=out.jsonl", *words]) == 0
    assert capsys.readouterr().err == f"out.jsonl: {len(rows)} rows\n"
    converted = lines(folder / "out.jsonl")
    parser = RowParser(SourceConfig(path="out.jsonl"), "messages")
    assert len(converted) == len(rows) and all("messages" in row for row in converted)
    texts = json.dumps(rows, ensure_ascii=False)
    for row in converted:
        example = parser.parse(row)
        assert isinstance(example, Conversation)
        assert all(message.role in ("system", "user", "assistant", "tool") for message in example.messages)
        assert all(line in texts for message in example.messages for line in message.content.split("\n"))
    # Converted once more it stays what it is.
    assert main(["data", "convert", "path=out.jsonl", "out=again.jsonl"]) == 0
    assert (folder / "again.jsonl").read_bytes() == (folder / "out.jsonl").read_bytes()


def test_limit_and_split_choose_the_rows(folder):
    (folder / "rows").mkdir()
    write(folder / "rows" / "train.jsonl", *(chat(str(i), "x") for i in range(9)))
    write(folder / "rows" / "test.jsonl", chat("other", "x"))
    assert main(["data", "convert", "path=rows", "split=train", "limit=4", "out=out.jsonl"]) == 0
    asked = [row["messages"][0]["content"] for row in lines(folder / "out.jsonl")]
    assert asked == ["0", "1", "2", "3"]


def test_bad_rows_stop_the_conversion_or_are_left_out_and_listed(folder, capsys):
    write(folder / "in.jsonl", "{broken", *(chat(str(i), "x") for i in range(29)), {"messages": []})
    assert main(["data", "convert", "path=in.jsonl", "out=out.jsonl"]) == 2
    err = capsys.readouterr().err
    assert "2 of 31 rows are bad (on_bad_row=skip leaves them out)" in err
    assert "in.jsonl:1: " in err and "in.jsonl:31: " in err and not (folder / "out.jsonl").exists()
    assert main(["data", "convert", "path=in.jsonl", "out=out.jsonl", "on_bad_row=skip"]) == 2
    assert "more than max_bad_share=0.05" in capsys.readouterr().err and not (folder / "out.jsonl").exists()
    assert main(["data", "convert", "path=in.jsonl", "out=out.jsonl", "on_bad_row=skip", "max_bad_share=0.1"]) == 0
    err = capsys.readouterr().err
    assert "29 rows, 2 bad rows left out" in err and "in.jsonl:31: " in err
    assert len(lines(folder / "out.jsonl")) == 29


def test_a_text_with_half_a_surrogate_pair_is_a_bad_row_or_comes_back(folder):
    """Every row that the reader accepts can be read again from the output."""
    write(folder / "in.jsonl", chat('a\\b \u2028 "q" \x00 é', "x"), chat("漢", "字"))
    assert main(["data", "convert", "path=in.jsonl", "out=out.jsonl"]) in (0, 2)
    if (folder / "out.jsonl").exists():
        assert [row.value for row in rows_of(SourceConfig(path="out.jsonl"))] == lines(folder / "in.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "path: is missing"),
        (["path=a.jsonl"], "out: is missing"),
        (["out=x.jsonl"], "path: is missing"),
        (["path=a.jsonl", "out=x.jsonl", "config=run.yaml"], "takes no config"),
        (["path=a.jsonl", "out=e.jsonl"], "e.jsonl: the file exists already"),
        (["path=a.jsonl", "out=none/x.jsonl"], "cannot be written"),
        (["path=a.jsonl", "out=x.jsonl", "formt=alpaca"], "did you mean format?"),
        (["path=a.jsonl", "out=x.jsonl", "format=alpca"], "did you mean alpaca?"),
        (["path=a.jsonl", "out=x.jsonl", "limit=0"], "limit: found 0; allowed: whole number >= 1"),
        (["path=a.jsonl", "out=x.jsonl", "split=train"], "split"),
        (["path=a.jsonl", "out=x.jsonl", "roles={bot: x}"], "system | user | assistant | tool"),
        (["path=a.jsonl", "out=x.jsonl", "on_bad_row=ignore"], "error | skip"),
        (["path=a.jsonl", "out=x.jsonl", "limit=0", "format=x"], "2 problems"),
        (["path=b.jsonl", "out=x.jsonl"], "format=text"),
        (["path=b.jsonl", "out=x.jsonl", "format=alpaca"], "instruction"),
        (["path=none.jsonl", "out=x.jsonl"], "none.jsonl"),
        (["path=tokens.jsonl", "out=x.jsonl"], "format=tokens"),
        (["path=empty.jsonl", "out=x.jsonl"], "no rows"),
        (["path=odd.jsonl", "out=x.jsonl"], "odd.jsonl"),
    ],
)
def test_a_failed_conversion_gives_the_reason_and_leaves_no_file(folder, capsys, words: list[str], message: str):
    write(folder / "tokens.jsonl", {"input_ids": [1, 2]})
    write(folder / "empty.jsonl")
    write(folder / "odd.jsonl", {"color": "red"})
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert main(["data", "convert", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


@pytest.mark.parametrize("words", [["data"], ["data", "convert"]])
def test_help_shows_examples(capsys, words: list[str]):
    assert main([*words, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples\n" in out and f"  finetune {' '.join(words)} " in out
