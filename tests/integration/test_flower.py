"""Federated rounds by Flower with real commands: three parties on this machine, of which one drops out per round."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.models.safetensors_header import read_header
from tests.commands import Done
from tests.flower import Flower

PARTIES = ("a", "b", "c")
DROPS = {1: "a", 2: "b", 3: "c"}
FAILED = "finetune train: exit code 9"
MAX_NORM = 100.0  # clips no update
CONFIG = """
model: {{name: "${{packaged:data/tiny-qwen2.5}}"}}
data: {{train: [{{path: {rows}}}], max_length: 256}}
train: {{max_steps: 2, batch_size: 2, learning_rate: 5e-3, compile: false}}
generation: {{num_examples: 0}}
"""


@pytest.fixture
def parties(repo_root: Path, tmp_path: Path) -> Path:
    """A folder with the config, rows and program of each party; the program fails in one round."""
    lines = (repo_root / "data" / "sample" / "train.jsonl").read_text().splitlines(keepends=True)
    for number, name in enumerate(PARTIES):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(lines[100 * number : 100 * number + 50]))
        (folder / "run.yaml").write_text(CONFIG.format(rows=folder / "rows.jsonl"))
        [drop] = [round for round, party in DROPS.items() if party == name]
        program = folder / "finetune"
        program.write_text(
            f'#!/bin/sh\ncase "$*" in train*/round-00{drop}/run*) exit 9;; esac\n'
            f'exec {sys.executable} -m finetune "$@"\n'
        )
        program.chmod(0o755)
    return tmp_path


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Flower]:
    flower = Flower(tmp_path, FINETUNE=f"{sys.executable} -m finetune")
    yield flower
    flower.stop()


def wait_for(condition: Callable[[], bool], flower: Flower, seconds: float = 1500) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, flower.log_of("server")
        time.sleep(0.5)


def by_hand(finetune: Callable[..., Done], parties: Path, out: Path) -> list[Path]:
    """The same rounds by the commands; returns the adapter of each."""
    adapters: list[Path] = []
    for number, dropped in DROPS.items():
        start = adapters[-1] if adapters else None
        sent = []
        for name in PARTIES:
            if name != dropped:
                run, update = out / f"run-{number}-{name}", out / f"sent-{number}-{name}"
                init = [] if start is None else [f"lora.init_adapter={start}"]
                words = ["lora.freeze_a=true", f"train.seed={number - 1}", f"output_dir={run}", *init]
                begin = [] if start is None else [f"start={start}"]
                for command in (
                    ("train", f"config={parties / name / 'run.yaml'}", *words),
                    ("clip", f"adapter={run}", f"out={update}", f"max_norm={MAX_NORM}", *begin),
                ):
                    done = finetune(*command)
                    assert done.returncode == 0, done.stderr
                sent.append(str(update))
        done = finetune("aggregate", f"adapters=[{','.join(sent)}]", f"out={out / f'round-{number}'}", *begin)
        assert done.returncode == 0, done.stderr
        adapters.append(out / f"round-{number}")
    return adapters


def tensors_of(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.timeout(2400)  # 15 commands, each with its imports
def test_rounds_with_dropped_parties_and_a_killed_server_have_the_bits_of_the_commands(
    flower: Flower, parties: Path, tmp_path: Path, finetune_command: Callable[..., Done]
):
    out = tmp_path / "out"

    settings = {"out": str(out), "rounds": len(DROPS), "min_parties": 2}
    flower.start_server()
    for name in PARTIES:
        folder = parties / name
        config = {"config": folder / "run.yaml", "work": folder / "work", "finetune": folder / "finetune"}
        flower.start_party(name, **config, max_norm=MAX_NORM)
    flower.run(**settings)
    wait_for((out / "rounds.jsonl").is_file, flower)
    first = tensors_of(out / "round-001")
    flower.kill("server")
    flower.start_server()
    flower.run(**settings)
    wait_for((out / "final").is_dir, flower)
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [line["left_out"] for line in lines] == [{party: FAILED} for party in DROPS.values()]
    # Once A is shared, B alone leaves a party.
    entries = read_header(out / "final" / "adapter_model.safetensors")[1]
    offsets = [entry["data_offsets"] for name, entry in entries.items() if ".lora_B." in name]
    of_b = sum(end - begin for begin, end in offsets)
    assert [line["bytes_received"] for line in lines[1:]] == [2 * of_b, 2 * of_b]
    folders = [out / f"round-00{number}" for number in DROPS]
    assert tensors_of(folders[0]) == first and tensors_of(folders[-1]) == tensors_of(out / "final")
    hand = by_hand(finetune_command, parties, tmp_path / "hand")
    assert [tensors_of(adapter) for adapter in hand] == [tensors_of(folder) for folder in folders]
