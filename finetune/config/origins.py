"""The YAML files that a config is composed of: in which line each key stands, and what is wrong with the files.

Hydra composes them, but stops at its first error and keeps no line numbers, so they are read here as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from finetune.config.problems import COMMAND_LINE, Problem

_PACKAGE = re.compile(r"#\s*@package\s+(\S+)")
_ENTRY = re.compile(r"(?P<optional>optional\s+)?(override\s+)?(?P<absolute>/)?(?P<group>[^@\s]*)(@\S+)?")
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge", "timestamp")}
_MOST_NODES, _DEEPEST = 20_000, 20


class _Entry(NamedTuple):
    """One choice in a defaults list; a file of the same folder has no group."""

    group: str
    option: str
    optional: bool
    line: int


@dataclass
class Origins:
    """Where every key of a composition was written.

    folders: searched for files in this order. chosen: group options of the command line; refused: those of them that do
    not exist. listed: groups that a defaults list names. problems: what is wrong with the files.
    """

    folders: Sequence[Path]
    chosen: Mapping[str, str]
    lines: dict[str, str] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    refused: dict[str, Problem] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)

    def of(self, key: str) -> str:
        """Where a key, or the nearest mapping or list around it, was written; empty if nowhere."""
        parts = key.split(".")
        outwards = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((self.lines[path] for path in outwards if path in self.lines), "")

    def read(self, file: Path) -> None:
        """A config and all that its defaults lists and the command line name."""
        self._visit(file, "", "")
        for group in sorted(self.chosen.keys() - self.listed):
            self._choose(_Entry(group, self.chosen[group], False, 0), COMMAND_LINE)

    def _visit(self, file: Path, group: str, package: str) -> None:
        """Note a file after what its defaults list names: its own keys win."""
        if file in self.seen:
            return
        self.seen.add(file)
        try:
            text = file.read_text(encoding="utf-8")
            if _depth(text) > _DEEPEST:
                self.problems.append(Problem("", f"is nested more than {_DEEPEST} deep", short(file)))
                return
            node = yaml.compose(text, yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{short(file)}:{mark.line + 1}:{mark.column + 1}" if mark else short(file)
            self.problems.append(Problem("", f"not YAML: {error.problem or error.context}", place))
            return
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            self.problems.append(Problem("", f"cannot be read: {error}", short(file)))
            return
        if isinstance(node, yaml.MappingNode) and self._sound(node, file):
            for entry in _defaults(node, group):
                self.listed.add(entry.group)
                self._choose(entry, f"{short(file)}:{entry.line}")
            if header := _PACKAGE.match(text):
                package = {"_global_": "", "_group_": package}.get(header[1], header[1])
            self._note(node, package, file)
        elif node is not None and not isinstance(node, yaml.MappingNode):
            self.problems.append(Problem("", "a config is a mapping of keys to values", short(file)))

    def _choose(self, entry: _Entry, origin: str) -> None:
        option = self.chosen.get(entry.group, entry.option).removesuffix(".yaml")
        file = self._file(entry.group, option)
        if file is not None:
            self._visit(file, entry.group, entry.group.replace("/", "."))
        elif entry.group in self.chosen:
            self.refused[entry.group] = Problem(entry.group, self._no_option(entry.group, option), COMMAND_LINE)
        elif not entry.optional and "${" not in option:
            self.problems.append(Problem(entry.group or "defaults", self._no_option(entry.group, option), origin))

    def _file(self, group: str, option: str) -> Path | None:
        files = (folder / group / f"{option}.yaml" for folder in self.folders)
        return next((file for file in files if os.path.isfile(file)), None)

    def _no_option(self, group: str, option: str) -> str:
        options = sorted({file.stem for folder in self.folders for file in (folder / group).glob("*.yaml")})
        near = get_close_matches(option.lower(), options, n=5, cutoff=0.5) or options
        own = "; a hub id or a folder is model.name" if group == "model" else ""
        return f"no option {option}; there is {', '.join(near) or 'none'}{own}"

    def _sound(self, node: yaml.MappingNode, file: Path) -> bool:
        before = len(self.problems)
        if _size(node, {}) > _MOST_NODES:
            text = f"holds more than {_MOST_NODES} values, or an alias of itself"
            self.problems.append(Problem("", text, short(file)))
            return False
        for inner, key in _nodes(node, ""):
            place = f"{short(file)}:{inner.start_mark.line + 1}:{inner.start_mark.column + 1}"
            self.problems += [Problem(key, text, place) for text in _faults(inner)]
        if any(name.value == "hydra" for name, _ in node.value):
            self.problems.append(Problem("hydra", "unknown key; a run has no Hydra settings", short(file)))
        return len(self.problems) == before

    def _note(self, node: yaml.MappingNode, package: str, file: Path) -> None:
        for inner, key in _nodes(node, package):
            self.lines[key] = f"{short(file)}:{inner.start_mark.line + 1}"


def short(file: Path) -> str:
    """A path as the user would write it: from the working directory if it lies below."""
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)


def _nodes(node: yaml.Node, key: str) -> Iterator[tuple[yaml.Node, str]]:
    yield node, key
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _nodes(value, f"{key}.{name.value}" if key else str(name.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _nodes(value, f"{key}.{index}")


def _faults(node: yaml.Node) -> Iterator[str]:
    if node.tag not in _PLAIN:
        yield f"the tag {node.tag} is refused; write a plain value"
    elif isinstance(node, yaml.MappingNode):
        names = [str(name.value) for name, _ in node.value]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{name} is given twice"
    elif isinstance(node, yaml.ScalarNode) and "${" in node.value:
        try:
            OmegaConf.create({"value": node.value})
        except GrammarParseError as error:
            yield f"not an interpolation: {str(error).partition(chr(10))[0]}; a ${{ that is text is written \\${{"


def _depth(text: str) -> int:
    """Nesting of a YAML text, counted without recursion and no further than needed."""
    depth = deepest = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        deepest = max(depth, deepest)
        if deepest > _DEEPEST:
            break
    return deepest


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a tree once its aliases are written out; one that holds itself is larger than any."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_NODES + 1
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _defaults(node: yaml.MappingNode, group: str) -> Iterator[_Entry]:
    """The entries of a config's defaults list, with the group they are in seen from the search path."""
    lists = [value for name, value in node.value if name.value == "defaults"]
    for item in lists[0].value if lists and isinstance(lists[0], yaml.SequenceNode) else []:
        line = item.start_mark.line + 1
        if isinstance(item, yaml.ScalarNode) and item.value != "_self_":
            folder, _, option = item.value.rpartition("/")
            base = folder[1:] if item.value.startswith("/") else "/".join(filter(None, (group, folder)))
            yield _Entry(base, option, False, line)
        elif isinstance(item, yaml.MappingNode):
            for name, value in item.value:
                match = _ENTRY.fullmatch(str(name.value))
                options = value.value if isinstance(value, yaml.SequenceNode) else [value]
                if match and isinstance(value, yaml.ScalarNode | yaml.SequenceNode):
                    inner = match["group"] if match["absolute"] or not group else f"{group}/{match['group']}"
                    for option in options:
                        if option.tag != f"{_TAG}null":
                            yield _Entry(inner, str(option.value), bool(match["optional"]), line)
