"""The site: its reference says what the schema and the commands say, and every page can be reached."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import finetune
from finetune.commands.base import COMMANDS, load_command
from finetune.config.keys import find, is_section, schema_fields
from finetune.config.peers import PEERS, REFUSED
from finetune.migration.settings import RULES, UNNEEDED
from finetune.system.arguments import parse_arguments
from finetune.system.resources import packaged

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return script("reference")


def test_the_tables_are_those_of_the_planner_and_the_packaged_models():
    tables = script("tables")
    places = [place[2] for page in tables.PAGES for place in tables._PLACE.finditer(page.read_text())]
    assert set(places) == set(tables.TABLES)
    stale = [page.name for page in tables.PAGES if tables.with_tables(page.read_text()) != page.read_text()]
    assert stale == [], "run: python docs/tables.py"


def commands_of(page: Path) -> Iterator[str]:
    """The command lines of finetune in the shell blocks of a page."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "finetune/train.py" in words:
                yield shlex.join(["train", *words[words.index("finetune/train.py") + 1 :]])
            elif words[:1] == ["finetune"]:
                yield shlex.join(words[1:])


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_has_known_options(page):
    """Read each command's words with its own reader: no unknown command, flag or key, no wrong value."""
    for words in map(shlex.split, commands_of(page)):
        name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        command = load_command(name)
        arguments = parse_arguments(words[len(name.split()) :], command.flags, command.takes_paths)
        if "--help" in arguments.flags:
            continue
        arguments = command._read_options(arguments)
        unknown = [word for word in arguments.overrides if find(word.partition("=")[0].lstrip("+~")) is None]
        groups = {folder.name for folder in packaged("configs").iterdir() if folder.is_dir()}
        assert [word for word in unknown if word.partition("=")[0] not in groups] == [], words


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []


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


def test_the_api_page_documents_every_public_name(reference):
    page = reference.api_page()
    assert [name for name in finetune.__all__ if name != "__version__" and f"\n## {name}\n" not in page] == []
    assert "rows: training examples in memory" in page


def test_the_migration_page_has_every_name(reference):
    page = reference.migration_page()
    missing = [name for name in [*PEERS, *RULES, *REFUSED, *UNNEEDED] if f"`{name}`" not in page]
    assert [name for name in missing if not (name in RULES and not RULES[name].key)] == []


def test_the_list_for_language_models_has_every_page_of_the_site(reference):
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    page = reference.llms_page(site["nav"], site["site_description"])
    assert set(re.findall(r"\]\(([\w/-]+\.md)\)", page)) == set(re.findall(r"[\w/-]+\.md", str(site["nav"])))


def test_the_site_leads_to_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/-]+\.md", str(site["nav"])))
    written = {file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    assert (
        listed - {"reference/settings.md", "reference/commands.md", "reference/migration.md", "reference/api.md"}
        == written
    )
