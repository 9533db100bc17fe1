"""`finetune cache`: the refusals before anything is loaded, and the next command that it prints."""

from __future__ import annotations

import shlex

import pytest

from finetune import load_config
from finetune.cli import main
from finetune.commands import cache
from finetune.config.schema import RunConfig

RECOVER = ("config=quickstart.yaml", "distill.objective=recover", "distill.cache=folder")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ([], "config=X.yaml"),
        (["config=quickstart.yaml"], "distill.objective"),
        (["config=quickstart.yaml", "distill.objective=recover"], "distill.cache"),
        ([*RECOVER, "data.stream_rows=100"], "data.stream_rows"),
        ([*RECOVER, "distill.on_policy=0.5"], "distill.on_policy"),
        ([*RECOVER, "distill.divergence=jsd"], "distill.divergence"),
        ([*RECOVER, "distill.temperature=2"], "distill.temperature"),
        ([*RECOVER, "distill.teacher.url=http://host/v1"], "distill.teacher.url"),
    ],
)
def test_a_cache_that_cannot_serve_the_run_is_refused_before_anything_is_written(
    words, key, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["cache", *words]) == 2
    captured = capsys.readouterr()
    assert key in captured.err and captured.out == "" and "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def trains_with(*given: str) -> tuple[list[str], RunConfig]:
    """Return the overrides after `next:`, and their config."""
    words = cache._training_overrides(load_config("quickstart.yaml", given), given)
    assert shlex.split(shlex.join(words)) == words
    return words, load_config("quickstart.yaml", words)


def test_the_next_command_repeats_the_overrides_except_the_placement_of_the_teacher():
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


def test_the_next_command_keeps_a_teacher_on_a_server():
    given = (
        "distill.objective=recover",
        "distill.cache=folder",
        "distill.teacher.placement=server",
        "distill.teacher.url=http://host:8000/v1",
    )
    assert trains_with(*given)[0] == list(given)


def test_a_shell_can_read_the_examples_of_the_help(capsys):
    assert main(["cache", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(cache.__doc__)
    examples = shlex.split(out[out.index("Examples\n") + len("Examples\n") : len(cache.__doc__)])
    assert examples.count("finetune") == 3 and examples.count("data.train=rows.jsonl") == 2
