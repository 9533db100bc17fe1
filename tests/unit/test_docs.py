"""The site: its reference says what the schema and the commands say, and every page can be reached."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from finetune.commands.base import COMMANDS, load_command
from finetune.config.keys import is_section, schema_fields

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_page_has_each_key_once_with_its_meaning(reference):
    page = reference.settings_page()
    for key, field in schema_fields().items():
        if is_section(field.annotation):
            assert f"\n## {key}\n" in page
        elif not key.startswith("data.eval.*"):
            (row,) = re.findall(rf"^\| `{re.escape(key.replace('*', '0'))}` \|.*$", page, flags=re.MULTILINE)
            assert field.description.replace("|", "\\|").replace("<", "&lt;") in row
            assert len(re.findall(r"(?<!\\)\|", row)) == 5, "four cells"


def test_the_commands_page_has_what_help_prints(reference):
    page = reference.commands_page()
    for name in COMMANDS:
        assert f"\n## finetune {name}\n" in page
        assert load_command(name).help().splitlines()[0] in page


def test_the_site_leads_to_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/-]+\.md", str(site["nav"])))
    written = {file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    assert listed - {"reference/settings.md", "reference/commands.md"} == written
