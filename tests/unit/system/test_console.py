"""Colors on terminals that take them, and keys typed while an answer streams."""

from __future__ import annotations

import os
import pty
import termios

import pytest

from finetune.config.keys import schema_help
from finetune.system.console import Pace, colored, line_width, silent_keys


@pytest.fixture
def terminal():
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb"), os.fdopen(theirs, "w") as stream:
        yield stream


def test_a_terminal_gets_colors_unless_it_or_the_user_refuses(terminal, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert colored("text", "red", terminal) != "text"
    with (tmp_path / "file").open("w") as file:
        assert colored("text", "red", file) == "text"
    monkeypatch.setenv("TERM", "dumb")
    assert colored("text", "red", terminal) == "text"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert colored("text", "red", terminal) == "text"


def test_help_fits_a_terminal_of_at_least_80_characters(terminal, monkeypatch):
    found = {}
    for columns in (40, 100, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("sys.stdout", terminal)
        found[columns] = line_width()
        lines = schema_help().splitlines()
        monkeypatch.undo()
        assert max(map(len, lines)) <= found[columns]
    assert found == {40: 80, 100: 100, 300: 120}


def test_keys_are_not_echoed_inside_and_are_again_after_an_error(terminal):
    echo = lambda: bool(termios.tcgetattr(terminal)[3] & termios.ECHO)  # noqa: E731
    assert echo()
    with pytest.raises(KeyboardInterrupt), silent_keys(terminal.fileno()):
        assert not echo()
        raise KeyboardInterrupt
    assert echo()


def test_a_line_about_progress_is_due_once_in_some_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("finetune.system.console.time.monotonic", lambda: now[0])
    pace, due = Pace(10.0), []
    for now[0] in (1.0, 9.9, 10.0, 11.0, 25.0, 34.9, 35.0):
        due.append(pace.is_due())
    assert due == [False, False, True, False, True, False, True]
