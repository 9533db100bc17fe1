"""Generate the reference pages of the site from the schema and the table of commands."""

from __future__ import annotations

import inspect
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import finetune
from finetune.commands.base import COMMANDS, load_command
from finetune.config.keys import allowed, default_of, is_section, schema_fields
from finetune.config.peers import PEERS, REFUSED
from finetune.migration.settings import RULES, UNNEEDED


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site (a hook of mkdocs)."""
    pages = {
        "reference/settings.md": settings_page,
        "reference/commands.md": commands_page,
        "reference/migration.md": migration_page,
        "reference/api.md": api_page,
    }
    for path, write in pages.items():
        files.append(File.generated(config, path, content=write()))
    files.append(File.generated(config, "llms.txt", content=llms_page(config.nav or [], str(config.site_description))))
    return files


def llms_page(nav: list[Any], description: str) -> str:
    """Return the list of pages for language models (llmstxt.org): a link and a title per line."""
    lines = ["# finetune", "", f"> {description}", ""]
    for entry in nav:
        [(title, target)] = entry.items()
        if isinstance(target, str):
            lines.append(f"- [{title}]({target})")
        else:
            lines += ["", f"## {title}", "", *(f"- [{name}]({page})" for item in target for name, page in item.items())]
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Return the page with the default, allowed values and meaning of every key."""
    lines = [
        "# Settings of a run",
        "",
        "The name of a key is its path on the command line: `train.max_steps=10`. An unknown key is refused, and the",
        "error names the nearest key. `data.eval` takes the same sources as `data.train`.",
        *_table("General", {key: field for key, field in schema_fields().items() if "." not in key}),
    ]
    for name, section in schema_fields().items():
        if is_section(section.annotation):
            inside = {
                key: field
                for key, field in schema_fields().items()
                if key.startswith(f"{name}.")
                and not key.startswith("data.eval.*")
                and not any(key.startswith(f"{deeper}.") for deeper in _sections_in(name))
            }
            lines += [*_table(name, inside, str(section.description))]
    return "\n".join(lines) + "\n"


def _sections_in(name: str) -> list[str]:
    found = [key for key, field in schema_fields().items() if is_section(field.annotation)]
    return [key for key in found if key.startswith(f"{name}.")]


def _table(title: str, fields: dict, text: str = "") -> list[str]:
    rows = [
        f"| `{key.replace('*', '0')}` | {_code(default_of(key, field))} | "
        f"{_cell(allowed(field.annotation, field.metadata))} | {_cell(str(field.description))} |"
        for key, field in fields.items()
        if not is_section(field.annotation)
    ]
    head = ["| key | default | allowed values | meaning |", "|---|---|---|---|"]
    return ["", f"## {title}", "", *([text, ""] if text else []), *([*head, *rows] if rows else [])]


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else "required"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def migration_page() -> str:
    """Return the page with our setting for each setting of other frameworks."""
    lines = [
        "# Coming from Axolotl, LLaMA-Factory, ms-swift, TRL or Unsloth",
        "",
        "```bash",
        "finetune migrate qlora.yml out=mine.yaml      # YAML, JSON, or a shell script with swift sft or trl sft",
        "finetune data config=mine.yaml show=3",
        "finetune train config=mine.yaml",
        "```",
        "",
        "The command writes a config of the same training. Settings that a file leaves out get the default of its",
        "framework. What has no counterpart is printed, and listed at the top of the new file.",
        "",
        "## Settings",
        "",
        "| here | there |",
        "|---|---|",
    ]
    theirs: dict[str, set[str]] = {}
    for name, key in PEERS.items():
        theirs.setdefault(key, set()).add(name)
    for name, rule in RULES.items():
        if rule.key:
            theirs.setdefault(rule.key, set()).add(name)
    known = list(schema_fields())
    for key in sorted(theirs, key=lambda key: (_order(key, known), key)):
        lines.append(f"| `{_cell(key)}` | {', '.join(f'`{_cell(name)}`' for name in sorted(theirs[key]))} |")
    lines += ["", "## Not needed", "", ", ".join(f"`{name}`" for name in sorted(UNNEEDED)) + "."]
    lines += ["", "## Without a counterpart", "", "| there | reason |", "|---|---|"]
    reasons: dict[str, list[str]] = {}
    for name, why in REFUSED.items():
        reasons.setdefault(why, []).append(f"`{name}`")
    lines += [f"| {', '.join(names)} | {_cell(why)} |" for why, names in reasons.items()]
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """Return the page with the signature and docstring of every public name."""
    lines = ["# Python API", "", "`import finetune` loads no torch; each name is loaded on first use."]
    for name in finetune.__all__:
        if callable(thing := getattr(finetune, name)):
            text = inspect.getdoc(thing) or ""
            lines += ["", f"## {name}", "", "```text", f"{name}{inspect.signature(thing)}", "", text, "```"]
    return "\n".join(lines) + "\n"


def _order(key: str, known: list[str]) -> int:
    plain = key.partition("=")[0].partition(" ")[0].strip(",;")
    return known.index(plain) if plain in known else len(known)


def commands_page() -> str:
    """Return the page with the help text of every command."""
    lines = ["# Commands", "", "The output of `finetune COMMAND --help`. Data goes to stdout, messages to stderr."]
    for name, summary in COMMANDS.items():
        text = load_command(name).help()
        if name == "train":  # the keys have their own page
            text = text.split("\n\nPackaged configs:")[0]
        lines += ["", f"## finetune {name}", "", f"{summary[0].upper()}{summary[1:]}.", "", "```text"]
        lines += [text.rstrip(), "```"]
    return "\n".join(lines) + "\n"
