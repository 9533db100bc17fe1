"""`finetune data` in a terminal, into a pipe, and into files for other programs."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.system.resources import packaged

COMMAND = (sys.executable, "-m", "finetune.cli", "data", "config=quickstart.yaml")
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def in_a_terminal(folder: Path, *words: str, **environment: str) -> str:
    """Run the command in a terminal, and return its output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *words],
        cwd=folder,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm-256color"} | environment,
    )
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 1 << 16):
            parts.append(part)
    except OSError:
        assert process.wait() == 0  # Linux reports a terminal with a closed other side as an error
    os.close(ours)
    return b"".join(parts).decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def colored(tmp_path_factory: pytest.TempPathFactory) -> str:
    return in_a_terminal(tmp_path_factory.mktemp("terminal"), "show=2")


def test_a_terminal_gets_colors(colored: str):
    assert "\x1b[32m" in colored and "⟦" not in colored
    assert "no warnings" in ESCAPE.sub("", colored)
    target = re.search(r"\x1b\[32m(\{.*?\})\x1b\[0m", colored)
    assert target is not None and json.loads(target[1])["quantity"]


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_without_colors_it_says_the_same(tmp_path: Path, colored: str, environment: dict[str, str]):
    plain = in_a_terminal(tmp_path, "show=2", **environment)
    assert "\x1b" not in plain and plain.count("⟦") == 1 + 2 and "<|im_end|>⟧" in plain
    report, _, _ = plain.partition("\ntargets ")
    assert report == ESCAPE.sub("", colored).partition("\ntargets ")[0]


def test_the_dump_is_what_the_tokenizers_own_template_makes_of_the_rows(finetune_command, tmp_path: Path):
    done = finetune_command("data", "config=quickstart.yaml", "data.train.0.limit=50", "dump=rows.jsonl")
    assert done.returncode == 0 and done.stderr == "dump: rows.jsonl\n"
    tokenizer = AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5")
    samples = {
        name: [json.loads(line) for line in (packaged("data") / "sample" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    }
    dumped = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(dumped) == 50 + len(samples["heldout"])
    header = tokenizer.encode("<|im_start|>assistant\n")
    for row in dumped:
        messages = samples[Path(row["source"]).stem][row["row"]]["messages"]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert row["input_ids"] == ids
        start = next(i for i in range(len(ids)) if ids[i : i + len(header)] == header) + len(header)
        assert row["labels"] == [-100] * start + ids[start:-1] + [-100]


def test_a_reader_that_goes_early_gets_no_traceback(tmp_path: Path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "show=50"], cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 1 and done.stderr == ""


def test_a_terminal_without_unicode_gets_question_marks(finetune_command, tmp_path: Path):
    row = {"prompt": "héé 漢 \u202e", "completion": "ok 漢"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ["show=1", "data.train=[{path: rows.jsonl}]", "data.eval=[]", "generation.num_examples=0"]
    done = finetune_command("data", "config=quickstart.yaml", *words, encoding="ascii")
    assert done.returncode == 0 and done.stderr == "" and "?ok ?<|im_end|>?" in done.stdout
