"""Errors of the system become errors of ours, which name the file and what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.system.errors import ConfigError, os_errors_as


def test_an_error_of_the_system_names_the_problem_and_others_pass(tmp_path: Path):
    with (
        pytest.raises(ConfigError, match=r"^out=a: cannot be written: No such file or directory \(.*file\)$"),
        os_errors_as(ConfigError, "out=a: cannot be written"),
    ):
        (tmp_path / "missing" / "file").read_bytes()
    with pytest.raises(ZeroDivisionError), os_errors_as(ConfigError, "out=a"):
        _ = 1 / 0
