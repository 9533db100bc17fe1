"""One grammar, one exit code an error class, data on stdout, messages on stderr, and no torch before it is needed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune import __version__
from finetune.cli import main
from finetune.commands.base import COMMANDS
from finetune.commands.train import COMMON
from finetune.config.compose import load_config, to_yaml
from finetune.config.keys import is_section, schema_fields
from finetune.system.arguments import parse_arguments
from finetune.system.errors import (
    ConfigError,
    DataError,
    FinetuneError,
    InputError,
    IntegrityError,
    Interrupted,
    MissingExtra,
    ResourceError,
)


def failing_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit code of `finetune train` when the command raises this."""

    def fail(*_):
        raise error

    monkeypatch.setattr("finetune.config.compose.load_config", fail)
    return main(["train", "config=quickstart.yaml"])


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (FinetuneError("while running"), 1),
        (InputError("wrong input"), 2),
        (ConfigError("wrong config"), 2),
        (DataError("wrong row"), 2),
        (MissingExtra("missing"), 2),
        (IntegrityError("torn"), 3),
        (ResourceError("full"), 4),
        (Interrupted(2, "stopped"), 130),
        (Interrupted(15, "stopped"), 143),
    ],
)
def test_an_expected_error_is_one_line_and_its_exit_code(monkeypatch, capsys, error: FinetuneError, exit_code: int):
    assert failing_with(monkeypatch, error) == exit_code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError(), "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory"), "train.gradient_checkpointing=all"),
        (torch.AcceleratorError("CUDA error: out of memory"), "offload"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
    ],
)
def test_what_ran_out_is_named_with_what_to_do(monkeypatch, capsys, error: Exception, named: str):
    assert failing_with(monkeypatch, error) == 4
    err = capsys.readouterr().err
    assert named in err and "Traceback" not in err


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("odd"), OSError(errno.EIO, "odd"), KeyError("odd")])
def test_anything_else_is_a_bug_with_its_traceback(monkeypatch, capsys, error: Exception):
    assert failing_with(monkeypatch, error) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and f"bug in finetune {__version__} ({type(error).__name__})" in err


def test_ctrl_c_is_130(monkeypatch, capsys):
    assert failing_with(monkeypatch, KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_rank_says_which_it_is_and_text_of_others_cannot_control_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    failing_with(monkeypatch, DataError("row \x1b[31mred"))
    assert capsys.readouterr().err == "error (rank 3): row ␛[31mred\n"


@pytest.mark.parametrize("typo", ["trian", "trin", "Train"])
def test_an_unknown_command_gets_the_nearest(capsys, typo: str):
    assert main([typo]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_no_command_shows_the_overview_and_is_an_error(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert all(lines.count(f"{name} {summary}") == 2 for name, summary in COMMANDS.items())


def test_a_process_of_a_command_looks_through_its_objects_seldom():
    """Those of the libraries stay as long as it does; going through them is seconds of every start and of every end."""
    code = (
        "import atexit, gc; from finetune.cli import main\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1_000))\n"
        "main(['--version']); print(gc.isenabled(), gc.get_threshold()[0] >= 10_000, gc.get_freeze_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["True True 0", "True"]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"finetune {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys):
    assert main([*command.split(), "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: finetune {command} ") and captured.err == ""


def test_the_help_of_train_has_the_common_keys_and_help_all_has_every_key(capsys):
    shown = []
    for flag in ("--help", "--help-all"):
        assert main(["train", flag]) == 0
        words = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        shown.append({word[0] for word in words if word})
    every = {key.replace("*", "0") for key, field in schema_fields().items() if not is_section(field.annotation)}
    assert shown[0] & every == set(COMMON)
    assert shown[1] >= {key for key in every if not key.startswith("data.eval.0")}


def test_train_without_a_config_lists_the_packaged_ones(capsys):
    assert main(["train", "train.max_steps=1"]) == 2
    err = capsys.readouterr().err
    assert "config=X.yaml" in err and "lora.yaml" in err and "quickstart.yaml" in err


def test_train_hands_the_config_to_the_recipe_and_dry_run_does_not(monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(
        "finetune.training.recipe.train",
        lambda cfg, verbose, reward_functions: trained.append((cfg.train.seed, verbose)),
    )
    assert main(["train", "config=quickstart.yaml", "train.seed=7"]) == 0
    assert main(["train", "config=quickstart.yaml", "train.seed=7", "--verbose"]) == 0
    assert trained == [(7, False), (7, True)]
    assert main(["train", "config=quickstart.yaml", "train.seed=8", "--dry-run"]) == 0
    short = capsys.readouterr().out
    assert main(["train", "config=quickstart.yaml", "train.seed=8", "--dry-run", "--verbose"]) == 0
    assert len(trained) == 2 and "seed: 8" in short
    # The default of lora.rank is shown among all settings only, and both are the same config.
    every = capsys.readouterr().out
    assert "rank:" in every and "rank:" not in short


def test_the_settings_of_a_dry_run_are_the_config(tmp_path, capsys):
    words = ["model=qwen2.5-0.5b-instruct", "lora=dora", "data.train=[{path: a.jsonl, weight: 2.0}]", "distill=anchor"]
    config = load_config("lora.yaml", words)
    (tmp_path / "again.yaml").write_text(to_yaml(config, changed_only=True))
    assert load_config(str(tmp_path / "again.yaml")) == config


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["lora.yaml"], "write config=lora.yaml"),
        (["--train.max_steps=3"], "write train.max_steps=3"),
        (["--config", "lora.yaml"], "write config=FILE"),
        (["--dryrun"], "did you mean --dry-run?"),
        (["--verbose"], "this command has"),
        (["lora"], "expected key=value"),
        (["=3"], "expected key=value"),
        (["config=a.yaml", "config=b.yaml"], "a.yaml, b.yaml"),
    ],
)
def test_a_word_that_does_not_fit_gets_what_to_write(words: list[str], advice: str):
    with pytest.raises(InputError) as raised:
        parse_arguments(words, ("--dry-run",))
    assert advice in str(raised.value)


def test_all_words_that_do_not_fit_are_named_at_once():
    with pytest.raises(InputError, match=r"(?s)one.*two\.yaml.*--three"):
        parse_arguments(["one", "two.yaml", "a=1", "--three"], ())


SETTING = st.tuples(st.from_regex(r"[a-z_.]+", fullmatch=True).filter(lambda key: key != "config"), st.text()).map(
    "=".join
)


@given(st.lists(SETTING), st.booleans())
def test_settings_pass_through_unchanged_and_in_order(overrides: list[str], dry: bool):
    words = [*overrides, "config=x.yaml", *(["--dry-run"] if dry else [])]
    parsed = parse_arguments(words, ("--dry-run",))
    assert parsed.overrides == tuple(overrides) and parsed.config == "x.yaml"
    assert parsed.flags == ({"--dry-run"} if dry else set())


@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_words_are_parsed_or_refused(words: list[str]):
    try:
        parsed = parse_arguments(words, ("--json",))
    except InputError:
        return
    assert len(parsed.overrides) + len(parsed.flags) <= len(words)


SHOW_LOADED = "import sys; print('loaded:', *sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after the code."""
    script = f"{code}\n{SHOW_LOADED}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "wandb", "numpy", "hydra", "pydantic", "rich"}


@pytest.mark.parametrize(
    "code",
    [
        "import finetune",
        "from finetune.cli import main; main(['--help'])",
        "from finetune.cli import main; main(['--version'])",
        "from finetune.cli import main; main(['cache', '--help'])",
        "from finetune.cli import main; main(['doctor', '--help'])",
    ],
)
def test_help_and_import_load_nothing_heavy(code: str):
    assert not loaded_by(code) & HEAVY


def test_help_of_options_loads_pydantic_and_nothing_else_that_is_heavy():
    calls = "; ".join(f"main([*{name.split()}, '--help'])" for name in COMMANDS)
    assert loaded_by(f"from finetune.cli import main; {calls}") & HEAVY <= {"pydantic"}


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["--help"], 0),
        (["config=quickstart.yaml", "--dry-run"], 0),
        (["config=quickstart.yaml", "train.seed=x"], 2),
        (["config=quickstart.yaml", "reward.loss=grpo"], 2),
        (["config=quickstart.yaml", "reward_function=a.py:b"], 2),
    ],
)
def test_the_schema_a_plan_and_a_wrong_config_need_no_torch(words: list[str], exit_code: int):
    loaded = loaded_by(f"from finetune.cli import main; assert main(['train', *{words}]) == {exit_code}")
    assert not loaded & (HEAVY - {"hydra", "pydantic", "rich"})


@pytest.mark.parametrize("command", [["train"], ["cache", "distill.cache=teacher"], ["data"]])
def test_rows_that_cannot_be_meant_are_all_told_before_torch_is_loaded(command: list[str], tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2", "response": "two"}\n')
    sources = "[{path: rows.jsonl}, {path: missing.jsonl}]"
    words = [*command, "config=distill.yaml", f"data.train={sources}"]
    code = f"import os; os.chdir({str(tmp_path)!r}); from finetune.cli import main; assert main({words}) == 2"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{SHOW_LOADED}"], capture_output=True, text=True)
    found, _, loaded = done.stderr.rpartition("\nloaded: ")
    assert "data.train[0]: " in found and "columns: {prompt: question, completion: answer}" in found, done.stderr
    assert "data.train[1]: missing.jsonl does not exist" in found
    assert not set(loaded.split()) & {"torch", "transformers", "peft", "accelerate", "bitsandbytes"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_setting_that_no_command_has_is_refused_before_torch_is_loaded(name: str):
    words = [*name.split(), "config=quickstart.yaml", "trian.seed=1"]
    loaded = loaded_by(f"from finetune.cli import main; assert main({words}) == 2")
    assert not loaded & {"torch", "transformers", "peft", "accelerate", "bitsandbytes"}


def test_a_reader_that_has_gone_is_no_bug():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "finetune.cli", "--help"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1 and done.stderr == b""
