"""The parts of the Flower app that need no Flower: what travels, which commands run, and how rounds go on."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

APP = Path(__file__).resolve().parents[2] / "launch" / "flower"
A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of the app, as Flower imports them."""
    monkeypatch.syspath_prepend(str(APP))
    names = ("adapters", "commands", "party", "rounds")
    modules: dict[str, ModuleType] = {name: importlib.import_module(f"federated.{name}") for name in names}
    yield SimpleNamespace(**modules)
    for name in [name for name in sys.modules if name.partition(".")[0] == "federated"]:
        del sys.modules[name]


def write(folder: Path, a: float, b: float, base: str = "/data/models/tiny") -> Path:
    folder.mkdir(parents=True)
    tensors = {A: torch.full((2, 3), a), B: torch.full((4, 2), b, dtype=torch.bfloat16)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 2}))
    (folder / "federation.json").write_text(json.dumps({"base": {"name": base}, "noise": 0}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_an_adapter_comes_out_of_a_message_with_its_bits_and_without_paths(app: SimpleNamespace, tmp_path: Path):
    found = app.adapters.read_adapter(write(tmp_path / "one", 1.5, -0.25))
    app.adapters.write_adapter(found, tmp_path / "two")
    there, here = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)
    assert {file.name for file in (tmp_path / "two").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "federation.json",
    }
    assert "/data" not in "".join(found.texts.values()) and '"tiny"' in found.texts["adapter_config.json"]
    hub = app.adapters.read_adapter(write(tmp_path / "hub", 1, 1, base="Qwen/Qwen2.5-7B"))
    assert "Qwen/Qwen2.5-7B" in hub.texts["adapter_config.json"]


def test_with_a_frozen_a_only_b_travels_and_the_receiver_adds_its_a(app: SimpleNamespace, tmp_path: Path):
    whole = app.adapters.read_adapter(write(tmp_path / "one", 1.5, -0.25)).tensors
    sent = app.adapters.without_a(whole)
    assert set(sent) == {B} and app.adapters.count_bytes(sent) == 4 * 2 * 2
    other = app.adapters.read_adapter(write(tmp_path / "two", 7, 0)).tensors
    assert app.adapters.completed(sent, other) == {A: other[A], B: whole[B]}


def test_the_words_of_a_round(app: SimpleNamespace):
    words = app.commands
    out, start = Path("/out"), Path("/start")
    assert words.train_words("run.yaml", "ffa", 3, None, out) == [
        "train",
        "config=run.yaml",
        "train.seed=3",
        "output_dir=/out",
        "lora.freeze_a=true",
    ]
    assert "lora.freeze_a=true" not in (given := words.train_words("run.yaml", "fedavg", 3, start, out))
    assert given[-1] == "lora.init_adapter=/start"
    quiet = words.clip_words(Path("/run"), start, out, words.Clipping(max_norm=0.5), 4)
    assert quiet == ["clip", "adapter=/run", "out=/out", "max_norm=0.5", "start=/start"]
    noisy = words.clip_words(Path("/run"), None, out, words.Clipping(0.5, noise=2.0), 4)
    assert noisy[-3:] == ["noise=2.0", "rounds=4", "delta=1e-05"] and "start=/start" not in noisy
    how = words.Averaging("fedavg", words.parse_weights("a=2, c=0.5"), max_norm=3.0, max_error=0.1)
    assert words.aggregate_words(["a", "b", "c"], start, out, how) == [
        "aggregate",
        "adapters=[a,b,c]",
        "out=/out",
        "method=fedavg",
        "start=/start",
        "weights=[2.0,1.0,0.5]",
        "max_norm=3.0",
        "max_error=0.1",
        "on_bad_party=leave_out",
    ]


def test_every_word_is_known_to_its_command(app: SimpleNamespace, repo_root: Path):
    from finetune.commands.base import load_command
    from finetune.system.arguments import parse_arguments

    words, out = app.commands, Path("/out")
    how = words.Averaging("fedavg", {"a": 2.0}, max_norm=3.0, max_error=0.1)
    config = str(repo_root / "configs" / "quickstart.yaml")
    for line in (
        words.train_words(config, "ffa", 3, out, out),
        words.clip_words(out, out, out, words.Clipping(noise=2.0), 4),
        words.aggregate_words(["a", "b"], out, out, how),
    ):
        command = load_command(line[0])
        command._read_options(parse_arguments(line[1:], command.flags, command.takes_paths))


def test_a_failed_command_says_its_name_and_exit_code_and_nothing_of_its_output(
    app: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FINETUNE", f"{sys.executable} -c 'import sys; sys.exit(\"row 3: secret\")'")
    with pytest.raises(app.commands.CommandFailed) as caught:
        app.commands.run(app.commands.executable(""), ["train"], tmp_path)
    assert str(caught.value) == "finetune train: exit code 1"


NONE: dict[int, str] = {}
# A program in place of finetune, which starts at once: B of a trained adapter is the seed of its round.
FINETUNE = """
import pathlib, struct, sys
sys.path.insert(0, APP)
from federated.adapters import Adapter, Tensor, read_adapter, write_adapter
command, options = sys.argv[1], dict(word.split("=", 1) for word in sys.argv[2:])
out = pathlib.Path(options["out"] if "out" in options else options["output_dir"])
with open(LOG, "a") as log:
    log.write(command + "\\n")
def adapter(b, texts={"adapter_config.json": "{}", "federation.json": '{"left_out": {}}'}):
    return Adapter({A: Tensor("F32", (2, 3), struct.pack("<6f", *[1] * 6)),
                    B: Tensor("F32", (4, 2), struct.pack("<8f", *[b] * 8))}, texts)
def b_of(folder):
    return struct.unpack("<8f", read_adapter(pathlib.Path(folder)).tensors[B].data)[0]
if command == "train":
    write_adapter(adapter(float(options["train.seed"])), out)
elif command == "clip":
    write_adapter(adapter(b_of(options["adapter"])), out)
else:
    parties = [b_of(name) for name in options["adapters"].strip("[]").split(",")]
    write_adapter(adapter(sum(parties) / len(parties)), out)
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    (tmp_path / "log").write_text("")
    names = f"A, B, LOG, APP = {A!r}, {B!r}, {str(tmp_path / 'log')!r}, {str(APP)!r}\n"
    (tmp_path / "finetune.py").write_text(names + FINETUNE)
    return [sys.executable, str(tmp_path / "finetune.py")]


def commands_run(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def settings(app: SimpleNamespace, program: list[str], tmp_path: Path, **changes: Any) -> Any:
    config = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config |= {"out": str(tmp_path / "out"), "rounds": 3, "finetune": " ".join(program)}
    return app.rounds.Settings.from_config({**config, **changes})


def parties_of(app: SimpleNamespace, program: list[str], tmp_path: Path, names: str) -> dict[int, Any]:
    return {
        node: app.party.Party.from_config(
            {"name": name, "config": "run.yaml", "work": str(tmp_path / name), "finetune": " ".join(program)}
        )
        for node, name in enumerate(names)
    }


def federate(
    app: SimpleNamespace, given: Any, parties: Mapping[int, Any], drops: Mapping[int, str] = NONE
) -> list[Any]:
    """Run the rounds in this process; drops: round -> the party whose command fails. Returns all tasks."""
    tasks: list[Any] = []

    def exchange(asked: Mapping[int, Any]) -> dict[int, Any]:
        answers = {}
        for node, task in asked.items():
            tasks.append(task)
            name = parties[node].name
            if drops.get(task.round) == name:
                answers[node] = app.rounds.Answer(name, None, "finetune train: exit code 9")
            else:
                answers[node] = app.rounds.Answer(name, parties[node].update(task))
        return answers

    app.rounds.Federation(given, lambda: list(parties), exchange, lambda text: None).run()
    return tasks


def lines_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]


def test_rounds_leave_out_a_dropped_party_by_name_and_send_a_once(
    app: SimpleNamespace, program: list[str], tmp_path: Path
):
    tasks = federate(app, settings(app, program, tmp_path), parties_of(app, program, tmp_path, "abc"), {1: "a", 2: "b"})
    lines = lines_of(tmp_path)
    assert [line["parties"] for line in lines] == [["b", "c"], ["a", "c"], ["a", "b", "c"]]
    assert [line["left_out"] for line in lines] == [
        {"a": "finetune train: exit code 9"},
        {"b": "finetune train: exit code 9"},
        {},
    ]
    of_a, of_b = 2 * 3 * 4, 4 * 2 * 4
    # Round 1 makes A at the parties. A travels to a, which was not there, and again to b, which failed.
    assert [line["bytes_received"] for line in lines] == [2 * (of_a + of_b), 2 * of_b, 3 * of_b]
    assert [line["bytes_sent"] for line in lines] == [0, 3 * of_b + of_a, 3 * of_b + of_a]
    assert [task.start is None for task in tasks] == [True] * 3 + [False] * 6
    final = load_file(tmp_path / "out" / "final" / "adapter_model.safetensors")
    assert torch.equal(final[A], torch.ones(2, 3)) and torch.equal(final[B], torch.full((4, 2), 2.0))


def test_a_killed_server_goes_on_after_its_last_round_and_no_party_trains_a_round_twice(
    app: SimpleNamespace, program: list[str], tmp_path: Path
):
    parties = parties_of(app, program, tmp_path, "ab")
    federate(app, settings(app, program, tmp_path, rounds=1), parties)
    before = (tmp_path / "out" / "round-001" / "adapter_model.safetensors").read_bytes()

    def killed(asked: Mapping[int, Any]) -> dict[int, Any]:
        for node, task in asked.items():
            parties[node].update(task)
        raise KeyboardInterrupt

    given = settings(app, program, tmp_path, rounds=2)
    with pytest.raises(KeyboardInterrupt):
        app.rounds.Federation(given, lambda: [0, 1], killed, lambda text: None).run()
    assert commands_run(tmp_path) == ["train", "clip"] * 2 + ["aggregate"] + ["train", "clip"] * 2
    federate(app, given, parties)
    assert commands_run(tmp_path)[9:] == ["aggregate"]
    assert (tmp_path / "out" / "round-001" / "adapter_model.safetensors").read_bytes() == before
    assert [line["round"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_round_with_too_few_updates_ends_the_run_and_keeps_the_rounds_before(
    app: SimpleNamespace, program: list[str], tmp_path: Path
):
    parties = parties_of(app, program, tmp_path, "ab")
    with pytest.raises(app.rounds.TooFewParties, match="round 2"):
        federate(app, settings(app, program, tmp_path), parties, {2: "b"})
    assert sorted(folder.name for folder in (tmp_path / "out").glob("round-*")) == ["round-001"]
    federate(app, settings(app, program, tmp_path), parties)
    assert [line["round"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_a_fraction_of_the_parties_is_asked_but_never_fewer_than_needed(
    app: SimpleNamespace, program: list[str], tmp_path: Path
):
    parties = parties_of(app, program, tmp_path, "abcde")
    federate(app, settings(app, program, tmp_path, fraction=0.6), parties)
    assert [len(line["parties"]) for line in lines_of(tmp_path)] == [3, 3, 3]
    assert len({tuple(line["parties"]) for line in lines_of(tmp_path)}) > 1


def test_names_that_are_no_names_or_of_two_parties_are_left_out(
    app: SimpleNamespace, program: list[str], tmp_path: Path
):
    parties = parties_of(app, program, tmp_path, "abcdd")
    update = app.rounds.Answer

    def exchange(asked: Mapping[int, Any]) -> dict[int, Any]:
        answers = {node: update(parties[node].name, parties[node].update(task)) for node, task in asked.items()}
        answers[2] = update("../c", answers[2].update)
        return answers

    app.rounds.Federation(settings(app, program, tmp_path, rounds=1), lambda: [*parties], exchange, print).run()
    [line] = lines_of(tmp_path)
    assert line["parties"] == ["a", "b"] and set(line["left_out"]) == {"node 2", "d"}


def test_two_runs_cannot_write_one_folder(app: SimpleNamespace, program: list[str], tmp_path: Path):
    parties, given = parties_of(app, program, tmp_path, "ab"), settings(app, program, tmp_path, rounds=1)

    def exchange(asked: Mapping[int, Any]) -> dict[int, Any]:
        with pytest.raises(app.rounds.FolderInUse):
            federate(app, given, parties)
        return {node: app.rounds.Answer(parties[node].name, parties[node].update(asked[node])) for node in asked}

    app.rounds.Federation(given, lambda: [*parties], exchange, lambda text: None).run()
    assert [line["round"] for line in lines_of(tmp_path)] == [1]


def test_wrong_settings_end_before_a_party_is_asked(app: SimpleNamespace, program: list[str], tmp_path: Path):
    for changes in ({"method": "fedex"}, {"method": "fedavg"}, {"out": ""}, {"weights": "a"}):
        with pytest.raises(ValueError):
            settings(app, program, tmp_path, **changes)
    for config in ({}, {"name": "../x", "config": "run.yaml", "work": "w"}):
        with pytest.raises(ValueError):
            app.party.Party.from_config(config)


def test_a_party_refuses_a_task_whose_folder_would_be_elsewhere(
    app: SimpleNamespace, program: list[str], tmp_path: Path
):
    [party] = parties_of(app, program, tmp_path, "a").values()
    with pytest.raises(app.party.BadTask):
        party.update(app.party.Task("../other", 1, "ffa", 0, None))
    assert commands_run(tmp_path) == [] and not (tmp_path / "a").exists()
