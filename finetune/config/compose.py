"""A config file and its overrides -> one validated RunConfig.

Order, the last wins: the schema's defaults, what Hydra composes from the file and its groups, `key=value` overrides.
Interpolations are resolved after that. Nothing is imported or instantiated on behalf of a config.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from omegaconf.resolvers import oc
from pydantic import ValidationError

from finetune.config.explain import problems_of, shown
from finetune.config.keys import find, is_section, sections, takes
from finetune.config.overrides import parse_overrides
from finetune.config.problems import COMMAND_LINE, Problem, config_error, printable
from finetune.config.repository import compose_files, short
from finetune.config.schema import RunConfig, Section
from finetune.system.errors import ConfigError
from finetune.system.resources import packaged

_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_INTERPOLATION = re.compile(r"(\\*)(\$\{)")
UNRESOLVED = object()
_WORD = re.compile(r"[A-Za-z/][A-Za-z0-9_/.-]*")
_NOT_TEXT = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"}


def load_config(path_or_name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a config file and `key=value` overrides describe.

    A name is looked up in the working directory, its `configs/` and the packaged configs, with or without `.yaml`.
    Raises: ConfigError, naming everything that is wrong at once.
    """
    file = _find(path_or_name)
    edits = parse_overrides(overrides)
    unresolved: list[Problem] = []
    with own_resolvers():
        composed = compose_files(file, _group_folders(file), edits.groups)
        problems = [*edits.problems, *composed.refused, *composed.problems]

        def locate(key: str) -> str:
            """Return where a key, or the nearest mapping or list around it, is written."""
            if any(f"{key}.".startswith(f"{edited}.") for edited, _ in edits.values):
                return COMMAND_LINE
            parts = key.split(".")
            outwards = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
            return next((composed.lines[path] for path in outwards if path in composed.lines), "")

        if composed.problems:
            raise config_error(short(file), problems, locate)
        tree = _with_defaults(composed.tree, file)
        for key, value in edits.values:
            problems += _assign(tree, "", key, value)
        values = resolved(tree, unresolved)
    problems += unresolved
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        told = tuple(f"{problem.key}." for problem in unresolved)
        problems += [problem for problem in problems_of(values, error) if not f"{problem.key}.".startswith(told)]
        raise config_error(short(file), problems, locate) from None
    if problems:
        raise config_error(short(file), problems, locate)
    return config


def saved_config(adapter: Path, overrides: Sequence[str] = ()) -> RunConfig | None:
    """The config of the run that an adapter's folder, or the checkpoint that it is, belongs to; None if it tells none.

    Raises: ConfigError if it cannot be read.
    """
    for folder in (adapter, *([adapter.parent] if adapter.name.startswith("checkpoint-") else [])):
        if (folder / "config.yaml").is_file():
            return load_config(str(folder / "config.yaml"), overrides)
    return None


def to_yaml(config: RunConfig) -> str:
    """The resolved YAML of a run, which load_config reads back to an equal RunConfig."""
    return yaml.dump(escaped(config.model_dump()), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes all text that any reader of YAML could take for something else, `2e-4` and `no` for example."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _WORD.fullmatch(text) and text.lower() not in _NOT_TEXT
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def _find(name: str) -> Path:
    places = list(dict.fromkeys((Path.cwd(), Path.cwd() / "configs", packaged("configs"))))
    for folder in places:
        for file in (folder / name, folder / f"{name}.yaml"):
            if file.suffix == ".yaml" and os.path.isfile(file):
                return file.resolve()
    known = sorted(file.name for file in packaged("configs").glob("*.yaml"))
    near = get_close_matches(f"{Path(name).stem}.yaml", known, n=3) or known
    looked = ", ".join(short(folder) for folder in places)
    raise ConfigError(printable(f"no config {name} (a .yaml file) in {looked}; packaged: {', '.join(near)}"))


def _group_folders(file: Path) -> list[Path]:
    """Where a group's options are looked up, after the config's own folder: `configs/` here, and the packaged ones."""
    here = Path.cwd() / "configs"
    folders = [here] if here.is_dir() else []
    return [folder for folder in dict.fromkeys([*folders, packaged("configs")]) if folder != file.parent]


def _with_defaults(composed: Mapping[Any, Any], file: Path) -> dict[Any, Any]:
    tree: dict[Any, Any] = {"name": escaped(file.stem), "output_dir": "outputs/${name}"}
    for name, section in sections().items():
        tree[name] = _defaults_of(section)
    _merge(tree, composed, RunConfig)
    return tree


def _defaults_of(section: type[Section]) -> dict[str, Any]:
    """Every key of a section that has a default, those of the sections in it as well."""
    return {
        key: _defaults_of(field.annotation) if is_section(field.annotation) else field.get_default()
        for key, field in section.model_fields.items()
        if not field.is_required()
    }


def _merge(tree: dict[Any, Any], values: Mapping[Any, Any], section: type[Section]) -> None:
    """Set a section's given keys; a section in it keeps the defaults of what it is not given."""
    for key, value in values.items():
        inner = section.model_fields[key].annotation if key in section.model_fields else None
        if is_section(inner) and isinstance(value, dict):
            _merge(tree[key], value, inner)
        else:
            tree[key] = value


def _assign(node: Any, done: str, rest: str, value: Any) -> list[Problem]:
    """Set the key `rest` of the node at `done`; a list must hold the item already."""
    if done and takes(dict, find(done)):
        step, rest = rest, ""  # Module names hold dots.
    else:
        step, _, rest = rest.partition(".")
    here = f"{done}.{step}" if done else step
    if not isinstance(node, dict if find(here) is None or not step.isdecimal() else dict | list):
        return [Problem(here, f"cannot be set: {done} is {shown(node)}")]
    slot: Any = int(step) if isinstance(node, list) else step
    if isinstance(node, list) and slot >= len(node):
        return [Problem(here, f"cannot be set: {done} has {len(node)} items, counted from 0")]
    if not rest:
        node[slot] = value
        return []
    if isinstance(node, dict) and takes(dict, find(here)):
        node.setdefault(slot, {})  # The items of data.train are sections without their defaults.
    return _assign(node.get(slot) if isinstance(node, dict) else node[slot], here, rest, value)


def resolved(tree: dict[str, Any], problems: list[Problem]) -> Any:
    """The tree without interpolations; UNRESOLVED stands for a value that is missing or cannot be resolved."""
    try:
        return _plain(OmegaConf.create(tree), "", problems)
    except OmegaConfBaseException as error:
        problems.append(Problem(error.full_key or "config", _first_line(error)))
    except (RecursionError, ValueError, TypeError) as error:
        problems.append(Problem("config", f"an interpolation refers to itself, or to nothing plain: {error}"))
    return {}


def _plain(node: Any, path: str, problems: list[Problem]) -> Any:
    if isinstance(node, DictConfig):
        return {key: _item(node, key, path, problems) for key in node}
    if isinstance(node, ListConfig):
        return [_item(node, index, path, problems) for index in range(len(node))]
    return node


def _item(node: Any, key: Any, path: str, problems: list[Problem]) -> Any:
    here = f"{path}.{key}" if path else str(key)
    try:
        return _plain(node[key], here, problems)
    except MissingMandatoryValue:
        problems.append(Problem(here, "is missing: ??? stands for a value that you give"))
    except OmegaConfBaseException as error:
        problems.append(Problem(here, _first_line(error)))
    return UNRESOLVED


def _first_line(error: OmegaConfBaseException) -> str:
    """What a resolver says, without the line and type information that OmegaConf puts around it."""
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).partition("\n")[0])


def escaped(value: Any) -> Any:
    """The same value for OmegaConf to take literally: a `${` in it is no interpolation."""
    if isinstance(value, dict):
        return {key: escaped(part) for key, part in value.items()}
    if isinstance(value, list):
        return [escaped(part) for part in value]
    return _INTERPOLATION.sub(r"\1\1\\\2", value) if isinstance(value, str) else value


@contextmanager
def own_resolvers() -> Generator[None]:
    """Give interpolations `${packaged:…}` and an `${oc.env:…}` that reads no secrets, for as long as this lasts.

    The resolved config is saved with the run, so a secret must not get into it.
    """
    before = dict(BaseContainer._resolvers)
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
    OmegaConf.register_new_resolver("packaged", _packaged, replace=True)
    try:
        yield
    finally:
        BaseContainer._resolvers.clear()
        BaseContainer._resolvers.update(before)


def _environment(name: str, *default: Any) -> str | None:
    if _SECRET.search(name):
        raise ConfigError(f"{name} looks like a secret, and a config is saved with its run")
    return oc.env(name, *default)


def _packaged(path: str) -> str:
    kind, _, rest = path.partition("/")
    if kind not in ("configs", "data"):
        raise ConfigError(f"packaged files are configs/… and data/…, not {path}")
    return str(packaged(kind) / rest)
