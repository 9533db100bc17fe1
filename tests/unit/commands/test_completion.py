"""The completion script completes commands, flags, keys and configs in a real shell."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from finetune.cli import main
from finetune.commands.base import COMMANDS

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    capture = pytest.MonkeyPatch()
    file = tmp_path_factory.mktemp("completion") / "finetune.bash"
    with file.open("w") as stream, capture.context() as patch:
        patch.setattr("sys.stdout", stream)
        assert main(["completion", "bash"]) == 0
    return str(file)


def completed(script: str, line: str) -> set[str]:
    """Return what bash offers after the line."""
    code = 'source "$1"; COMP_LINE="$2"; COMP_POINT=${#COMP_LINE}; _finetune; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run([BASH, "-c", code, "bash", script, line], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_every_command_is_offered(script):
    assert completed(script, "finetune ") >= {name.split()[0] for name in COMMANDS}
    assert completed(script, "finetune da") == {"data"}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("finetune train --d", {"--dry-run"}),
        ("finetune train train.learning", {"train.learning_rate="}),
        ("finetune train train.max_steps=3 lora.ran", {"lora.rank=", "lora.rank_pattern="}),
        ("finetune data con", {"convert"} | {"config=quickstart.yaml"}),
        ("finetune data convert on_b", {"on_bad_row="}),
        ("finetune merge kl_check.max", {"kl_check.max_kl="}),
        ("finetune merge config=", {""}),
        ("finetune sweep sweep.tri", {"sweep.trials="}),
        ("finetune recipes lap", {"laptop"}),
        ("finetune completion f", {"fish"}),
        ("finetune train config=quick", {"quickstart.yaml"}),
    ],
)
def test_flags_keys_and_configs_are_offered(script, line: str, offered: set[str]):
    found = completed(script, line)
    assert found >= offered - {""} and all(word in found for word in offered if word)
    if "=" not in line.split()[-1] and len(offered) == 1:
        assert found == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_the_same_words(shell: str, capsys):
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("sensitivity", "--dry-run", "kl_check.max_kl=", "config=quickstart.yaml"))


@pytest.mark.parametrize("words", [[], ["tcsh"], ["bash", "zsh"]])
def test_another_shell_is_refused(words: list[str], capsys):
    assert main(["completion", *words]) == 2
    assert "bash, zsh or fish" in capsys.readouterr().err
