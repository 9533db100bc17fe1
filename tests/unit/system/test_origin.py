"""A run's origin is recorded, and a missing repository, git or CPU name is no failure."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from finetune.system import machine
from finetune.system.origin import command_line, git_commit, hardware


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_folder_and_says_whether_files_changed(tmp_path: Path):
    assert git_commit(tmp_path) is None and git_commit(tmp_path / "missing") is None
    git(tmp_path, "init")
    assert git_commit(tmp_path) is None
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    git(tmp_path, "tag", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{head}-dirty"


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(Path.cwd()) is None


def test_the_command_line_can_be_pasted():
    words = ["/env/bin/finetune", "train", "data.train=[{path: a b}]"]
    assert command_line(words) == "finetune train 'data.train=[{path: a b}]'"
    assert command_line(["/site/finetune/__main__.py", "doctor"]) == "finetune doctor"
    assert command_line([]) is None


def test_the_hardware_has_a_name_on_every_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Z80 @ 4 MHz\n")
    monkeypatch.setattr(machine, "_PROCESSOR", tmp_path / "cpuinfo")
    assert hardware("cpu")["cpu"] == "Z80 @ 4 MHz"
    monkeypatch.setattr(machine, "_PROCESSOR", tmp_path / "missing")
    found = hardware("cpu")
    assert found["cpu"] and found["cores"] >= 1 and found["threads"] >= 1 and "gpu" not in found
