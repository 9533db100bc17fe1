"""Compose YAML files with Hydra, check each file that Hydra reads, and remember where each key is written."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.defaults_list import Overrides, _create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.version import VersionBase, setbase
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from finetune.config.overrides import quoted
from finetune.config.problems import COMMAND_LINE, Problem
from finetune.system.console import printable
from finetune.system.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge", "timestamp")}
_MOST_NODES, _DEEPEST = 20_000, 20
_LONGEST_REASON = 300


class Composed(NamedTuple):
    """What Hydra composed: the tree with its interpolations, `file:line` of every key, and what is wrong.

    refused: group options of the command line that do not exist; the tree is composed without them.
    """

    tree: dict[Any, Any]
    lines: Mapping[str, str]
    problems: list[Problem]
    refused: list[Problem]


def compose_files(file: Path, folders: Sequence[Path], groups: Mapping[str, str]) -> Composed:
    """Compose a config file.

    Args:
        folders: where the options of a group are looked up, after the config's own folder.
        groups: option of each group that the command line chooses, as {model: qwen2.5-7b}.

    Raises:
        ConfigError: Hydra refuses the files for a reason that has no line.
    """
    repository = _Repository([file.parent, *folders])
    try:
        with _hydra_1_3():
            chosen = {name: option for name, option in groups.items() if repository.config_exists(f"{name}/{option}")}
            defaults = _defaults_list(repository, file.name, chosen)
            loader = ConfigLoaderImpl(ConfigSearchPathImpl())
            composed = loader._compose_config_from_defaults_list(defaults=defaults, repo=repository)
        tree: Any = OmegaConf.to_container(composed, resolve=False)
    except Exception as error:  # Hydra raises errors of many kinds, all of them about the user's files.
        reason = str(error).partition("\n")[0][:_LONGEST_REASON] or type(error).__name__
        raise ConfigError(printable(f"{short(file)}: cannot be composed: {reason}", one_line=True)) from error
    refused = [
        Problem(name, repository.no_option(name, groups[name]), COMMAND_LINE) for name in groups if name not in chosen
    ]
    return Composed(tree, repository.lines_of(defaults), [*repository.problems, *repository.missing()], refused)


@contextmanager
def _hydra_1_3() -> Generator[None]:
    """Choose Hydra's 1.3 rules, as `version_base` does, and leave no trace of it.

    Hydra warns where a defaults list has no `_self_`; without it a file's own keys win, as they should.
    """
    before = VersionBase.instance().version_base
    setbase("1.3")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*missing `_self_`", category=UserWarning)
            yield
    finally:
        VersionBase.instance().version_base = before


def _defaults_list(repository: _Repository, name: str, chosen: Mapping[str, str]) -> list[ResultDefault]:
    """Return Hydra's list of the files to merge, in order, with the package of each.

    Hydra writes a group that no defaults list names as `+group`, and stops at the first file that is missing: the walk
    starts again until no such group and no such file is left.
    """
    parser, unlisted = OverridesParser.create(), set()
    while True:
        texts = [f"{'+' * (group in unlisted)}{group}={quoted(option)}" for group, option in chosen.items()]
        overrides = Overrides(repository, [parser.parse_override(text) for text in texts])
        try:
            defaults, _ = _create_defaults_list(repository, name, overrides, prepend_hydra=False, skip_missing=False)
        except MissingConfigException as error:
            path = error.missing_cfg_file
            if path is None or path in repository.absent:
                raise
            repository.absent.append(path)
            continue
        unused = {group for group in chosen if group not in unlisted and not overrides.override_metadata[group].used}
        if not unused:
            overrides.ensure_overrides_used()
            return defaults
        unlisted |= unused


class _Repository(ConfigRepository):
    """Hydra's view of the folders. An empty config stands in for a file that is missing or not sound."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.sources: list[ConfigSource] = [FileConfigSource("folder", f"file://{folder}") for folder in folders]
        self.problems: list[Problem] = []
        self.absent: list[str] = []
        self._loaded: dict[str, ConfigResult | None] = {}
        self._nodes: dict[str, tuple[Path, yaml.MappingNode]] = {}

    def get_schema_source(self) -> ConfigSource:
        return StructuredConfigSource("schema", "structured://")

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path in self.absent:
            return _empty()
        if config_path not in self._loaded:
            self._loaded[config_path] = self._read(config_path)
        return self._loaded[config_path]

    def lines_of(self, defaults: Sequence[ResultDefault]) -> dict[str, str]:
        """Return `file:line` of every key; of two files that set it, the one that Hydra merges later."""
        lines = {}
        for default in defaults:
            if default.config_path in self._nodes:
                file, node = self._nodes[default.config_path]
                lines |= {key: _place(file, inner) for inner, key in _walk(node, default.package or "")}
        return lines

    def missing(self) -> Iterator[Problem]:
        """Yield a problem for each file that a defaults list names and that does not exist."""
        for path in self.absent:
            group, _, option = path.rpartition("/")
            places = [
                _place(file, leaf)
                for file, node in self._nodes.values()
                for leaf, key in _walk(node, "")
                if key.startswith("defaults.") and str(leaf.value).removesuffix(".yaml").endswith(option)
            ]
            yield Problem(group or "defaults", self.no_option(group, option), places[0] if places else "")

    def no_option(self, group: str, option: str) -> str:
        options = self.get_group_options(group)
        near = get_close_matches(option.lower(), options, n=5, cutoff=0.5) or options
        own = "; a hub id or a folder is model.name" if group == "model" else ""
        return f"no option {option}; there is {', '.join(near) or 'none'}{own}"

    def _read(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None:
            return None
        file = Path(source.path, source._normalize_file_name(config_path))
        try:
            node = _parse(file)
            problems = list(_faults(file, node))
            if isinstance(node, yaml.MappingNode) and not problems:
                self._nodes[config_path] = file, node
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f"{short(file)}:{mark.line + 1}:{mark.column + 1}" if mark else short(file)
            problems = [Problem("", f"not YAML: {error.problem}", place)]
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            problems = [Problem("", f"cannot be read: {error}", short(file))]
        self.problems += problems
        return _empty() if problems else super().load_config(config_path)


def _empty() -> ConfigResult:
    return ConfigResult("stand-in", "", OmegaConf.create(), {"package": None}, defaults_list=[])


def short(file: Path) -> str:
    """Return a path as the user would write it: relative to the working directory if the file is below it."""
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)


def _place(file: Path, node: yaml.Node) -> str:
    return f"{short(file)}:{node.start_mark.line + 1}"


def _parse(file: Path) -> yaml.Node | None:
    """Return the nodes of a YAML file; the nesting is measured first, without recursion."""
    text = file.read_text(encoding="utf-8")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep")
    return yaml.compose(text, yaml.SafeLoader)


def _faults(file: Path, node: yaml.Node | None) -> Iterator[Problem]:
    """Yield what makes a file unfit for Hydra, each with its place."""
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        yield Problem("", "a config is a mapping of keys to values", short(file))
        return
    if next(islice(_walk(node, ""), _MOST_NODES, None), None) is not None:
        yield Problem("", f"holds more than {_MOST_NODES} values, or an alias of itself", short(file))
        return
    for inner, key in _walk(node, ""):
        place = f"{_place(file, inner)}:{inner.start_mark.column + 1}"
        if inner.tag not in _PLAIN:
            yield Problem(key, f"the tag {inner.tag} is refused; write a plain value", place)
        elif isinstance(inner, yaml.MappingNode):
            names = Counter(_name(name) for name, _ in inner.value)
            for name in sorted(name for name in names if names[name] > 1):
                yield Problem(key, f"{name} is given twice", place)
        elif isinstance(inner, yaml.ScalarNode) and "${" in inner.value:
            try:
                OmegaConf.create({"value": inner.value})
            except GrammarParseError as error:
                reason = str(error).partition("\n")[0]
                yield Problem(key, f"not an interpolation: {reason}; a ${{ that is text is written \\${{", place)
    for name, value in node.value:
        if name.value == "hydra":
            yield Problem("hydra", "unknown key; a run has no Hydra settings", _place(file, name))
        if name.value == "defaults" and not isinstance(value, yaml.SequenceNode):
            yield Problem("defaults", "the defaults must be a list", _place(file, name))


def _walk(node: yaml.Node, key: str) -> Iterator[tuple[yaml.Node, str]]:
    """Yield a node and all values in it, each with its key; without end for an alias of itself."""
    stack = [(node, key)]
    while stack:
        node, key = stack.pop()
        yield node, key
        parts: list[tuple[yaml.Node, Any]] = []
        if isinstance(node, yaml.MappingNode):
            parts = [(value, _name(name)) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            parts = [(value, index) for index, value in enumerate(node.value)]
        stack += [(value, f"{key}.{name}" if key else str(name)) for value, name in reversed(parts)]


def _name(key: yaml.Node) -> str:
    return key.value if isinstance(key, yaml.ScalarNode) else "?"
