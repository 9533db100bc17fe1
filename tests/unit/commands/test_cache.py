"""`finetune cache`: what it refuses before anything is loaded, and the command it ends with."""

from __future__ import annotations

import re
import shlex

import pytest

from finetune import load_config
from finetune.cli import main
from finetune.commands.cache import USAGE, _training_overrides
from finetune.config.schema import RunConfig

RECOVER = ("config=quickstart.yaml", "distill.objective=recover", "distill.cache=folder")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            r"error: finetune cache: config=X\.yaml is missing",
        ),
        (
            ["config=quickstart.yaml"],
            r"error: distill\.objective: is none in quickstart\.yaml.*",
        ),
        (["config=quickstart.yaml", "distill.objective=recover"], r"  distill\.cache: .*folder; name it"),
        ([*RECOVER, "data.stream_rows=100"], r"  data\.stream_rows \(command line\): rows of a stream .*"),
        ([*RECOVER, "distill.on_policy=0.5"], r"  distill\.on_policy \(command line\): asks the teacher .*"),
        (
            [*RECOVER, "distill.divergence=jsd"],
            r"  distill\.divergence \(command line\): a sampled cache's signal gives "
            r"forward_kl only, not jsd; set cache_kind=hidden.*",
        ),
        ([*RECOVER, "distill.temperature=2"], r"  distill\.temperature \(command line\): .*; set cache_kind=hidden.*"),
        ([*RECOVER, "distill.teacher.url=http://host/v1"], r"  distill\.teacher\.url \(command line\): is for .*"),
    ],
)
def test_what_a_folder_cannot_serve_is_refused_in_a_line_before_anything_is_loaded(
    words, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["cache", *words]) == 2
    captured = capsys.readouterr()
    said = captured.err.strip("\n").split("\n")
    if said[0].startswith("error: 1 problem in "):
        said = said[1:]
    said = [line for line in said if not line.startswith("help: ")]
    assert len(said) == 1 and re.fullmatch(message, said[0]) and captured.out == ""
    assert not list(tmp_path.iterdir())


def trains_with(*given: str) -> tuple[list[str], RunConfig]:
    """The overrides after `next:`, as a shell would pass them on, and the run that they describe."""
    words = _training_overrides(load_config("quickstart.yaml", given), given)
    assert shlex.split(shlex.join(words)) == words
    return words, load_config("quickstart.yaml", words)


def test_the_next_command_repeats_what_was_given_but_how_the_teacher_is_asked():
    rows = "data.train=[{path: 'my rows.jsonl', limit: 3}]"
    given = ("distill.objective=recover", rows, "distill.teacher.placement=streamed", "distill.cache=a folder")
    words, cfg = trains_with(
        *given, "distill.teacher.steps_ahead=4", "distill.cache_kind=hidden", "distill.divergence=jsd"
    )
    assert words == [
        "distill.objective=recover",
        rows,
        "distill.cache=a folder",
        "distill.cache_kind=hidden",
        "distill.divergence=jsd",
        "distill.teacher.placement=cached",
        "distill.teacher.steps_ahead=1",
    ]
    assert cfg.distill.teacher.placement == "cached" and cfg.distill.cache == "a folder"
    assert cfg.data.train[0].path == "my rows.jsonl"


def test_what_a_server_said_is_trained_from_as_a_servers():
    given = (
        "distill.objective=recover",
        "distill.cache=folder",
        "distill.teacher.placement=server",
        "distill.teacher.url=http://host:8000/v1",
    )
    assert trains_with(*given)[0] == list(given)


def test_help_names_what_it_writes_and_its_examples_are_read_by_the_shell(capsys):
    assert main(["cache", "--help"]) == 0
    assert capsys.readouterr().out.startswith(USAGE)
    examples = shlex.split(USAGE[USAGE.index("Examples\n") + len("Examples\n") :])
    assert examples.count("finetune") == 2 and examples.count("data.train=[{path: rows.jsonl}]") == 2
