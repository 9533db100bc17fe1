"""What CI makes of a report of pip-audit: unknown weaknesses fail, known ones are printed, no database is said."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / ".ci" / "audit.py"
PLAIN = {"name": "a", "version": "1", "vulns": []}
WEAK = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3"], "description": "x"}],
}
SKIPPED = {"name": "c", "skip_reason": "not found"}


@pytest.fixture
def audit() -> ModuleType:
    if not FILE.is_file():
        pytest.skip("needs .ci/audit.py, which an unpacked source distribution lacks")
    spec = importlib.util.spec_from_file_location("audit", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_weakness_passes(audit):
    assert audit.judge({"dependencies": [PLAIN]})[1] is False


def test_an_unknown_weakness_fails_and_is_named(audit):
    lines, unknown = audit.judge({"dependencies": [PLAIN, WEAK, SKIPPED]})
    assert unknown
    assert any("b 2: PYSEC-1 (mended in 3): NOT KNOWN" in line for line in lines)
    assert "not looked up: c" in lines


@pytest.mark.parametrize("name", ["PYSEC-1", "CVE-1"])
def test_a_known_weakness_is_printed_with_its_reason(audit, monkeypatch, name):
    monkeypatch.setattr(audit, "KNOWN", {name: "not on our paths"})
    lines, unknown = audit.judge({"dependencies": [WEAK]})
    assert not unknown and any("known: not on our paths" in line for line in lines)


def test_a_mended_weakness_that_is_still_listed_is_said(audit, monkeypatch):
    monkeypatch.setattr(audit, "KNOWN", {"CVE-9": "old"})
    assert any("CVE-9 is in KNOWN" in line for line in audit.judge({"dependencies": [PLAIN]})[0])


def test_without_a_database_it_says_so_and_passes(audit, tmp_path, capsys, monkeypatch):
    [line], unknown = audit.judge({"dependencies": [SKIPPED]})
    assert line.startswith("none: the database has no answer") and not unknown
    (tmp_path / "pip_audit.py").write_text("raise SystemExit('no route to the database')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert audit.main(sys.executable) == 0
    assert "none: pip-audit got no answer (no route to the database)" in capsys.readouterr().out
