"""Load a config file and its overrides as one validated RunConfig.

The last one wins: defaults of the schema, the file and its groups as Hydra composes them, `key=value` overrides.
Interpolations are resolved after that. A config can neither import nor instantiate anything.
"""

from __future__ import annotations

import glob
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
from finetune.config.problems import COMMAND_LINE, Problem, config_error
from finetune.config.repository import compose_files, short
from finetune.config.schema import RunConfig, Section
from finetune.system.console import log_once, printable
from finetune.system.errors import ConfigError
from finetune.system.manifest import differences
from finetune.system.resources import packaged, packaged_configs

_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_INTERPOLATION = re.compile(r"(\\*)(\$\{)")
UNRESOLVED = object()
_WORD = re.compile(r"[A-Za-z/][A-Za-z0-9_/.-]*")
_NOT_TEXT = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"}


def load_config(path_or_name: str, overrides: Sequence[str] = (), needs_data: bool = True) -> RunConfig:
    """Load the config of a run.

    Args:
        path_or_name: a file, looked up in the working directory, its `configs/` and the packaged configs; `.yaml` may
            be left out.
        overrides: `key=value` words.
        needs_data: whether data.train must be set; a plan and a chat do without.

    Raises:
        ConfigError: lists every problem with its key and place.
    """
    file = _find(path_or_name)
    edits = parse_overrides(overrides)
    unresolved: list[Problem] = []
    with own_resolvers():
        composed = compose_files(file, [Path.cwd() / "configs", packaged("configs")], edits.groups)
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
        tree: dict[Any, Any] = {"name": escaped(file.stem), "output_dir": "outputs/${name}"}
        tree |= {name: section.model_construct().model_dump() for name, section in sections().items()}
        _merge(tree, composed.tree, RunConfig)
        given = {key for key, value in edits.values if value is not None}
        for key, other in (("train.max_steps", "train.epochs"), ("train.epochs", "train.max_steps")):
            if key in given and other not in given and isinstance(tree["train"], dict):
                tree["train"][other.partition(".")[2]] = None  # The command line wins over the other one of the file.
        for key, value in edits.values:
            problems += _assign(tree, "", key, value)
        values = resolved(tree, unresolved)
    problems += unresolved
    if needs_data and isinstance(values.get("data"), dict) and values["data"].get("train") == []:
        problems.append(Problem("data.train", "is missing: the training examples; set data.train=rows.jsonl"))
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        known = tuple(f"{problem.key}." for problem in unresolved)
        problems += [problem for problem in problems_of(values, error) if not f"{problem.key}.".startswith(known)]
        raise config_error(short(file), problems, locate) from None
    if problems:
        raise config_error(short(file), problems, locate)
    config = _with_files_beside(config, file.parent)
    if "output_dir" not in composed.tree and "output_dir" not in dict(edits.values):
        config.model_fields_set.discard("output_dir")  # So that a run knows whether the user chose the folder.
    return config


def _with_files_beside(config: RunConfig, folder: Path) -> RunConfig:
    """Replace paths of datasets that the working directory lacks by files of this name beside the config."""
    found: dict[str, Any] = {}
    for name in ("train", "eval"):
        sources = list(getattr(config.data, name))
        for i, source in enumerate(sources):
            path = os.path.expanduser(source.path)
            beside = folder / path
            if not os.path.isabs(path) and not glob.glob(path) and glob.glob(str(beside)):
                log_once(f"data.{name}[{i}].path: {source.path} is not in {Path.cwd()}; read from {folder}")
                sources[i] = source.model_copy(update={"path": str(beside)})
                found[name] = sources
    return config.model_copy(update={"data": config.data.model_copy(update=found)}) if found else config


def saved_config(adapter: Path, overrides: Sequence[str] = ()) -> RunConfig | None:
    """Load the config of the run that made an adapter folder or a checkpoint; return None if there is none.

    Raises:
        ConfigError: the config is not valid.
    """
    for folder in (adapter, *([adapter.parent] if adapter.name.startswith("checkpoint-") else [])):
        if (folder / "config.yaml").is_file():
            for problem in differences(folder, ["config.yaml"]):  # a user may edit it
                log_once(f"WARNING: {folder}: {problem} since the run wrote it")
            return load_config(str(folder / "config.yaml"), overrides)
    return None


def to_yaml(config: RunConfig, *, changed_only: bool = False) -> str:
    """Return the resolved config as YAML; load_config reads an equal RunConfig from it.

    changed_only: without the settings that have their default value.
    """
    settings = config.model_dump(exclude_defaults=changed_only)
    return yaml.dump(escaped(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text that a YAML reader could take for another type, for example `2e-4` and `no`."""


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
    near = get_close_matches(f"{Path(name).stem}.yaml", packaged_configs(), n=3) or packaged_configs()
    looked = ", ".join(short(folder) for folder in places)
    message = f"no config {name} (a .yaml file) in {looked}; packaged: {', '.join(near)}"
    raise ConfigError(printable(message, one_line=True))


def _merge(tree: dict[Any, Any], values: Mapping[Any, Any], section: type[Section]) -> None:
    """Set the given keys of a section; keys of inner sections that are not given keep their defaults."""
    for key, value in values.items():
        inner = section.model_fields[key].annotation if key in section.model_fields else None
        if is_section(inner) and isinstance(value, dict):
            _merge(tree[key], value, inner)
        else:
            tree[key] = value


def _assign(node: Any, done: str, rest: str, value: Any) -> list[Problem]:
    """Set the key `rest` of the node at path `done`; an item of a list must already exist."""
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
    """Resolve every interpolation; UNRESOLVED replaces a value that is missing or cannot be resolved."""
    try:
        return _plain(OmegaConf.create(tree), "", problems)
    except OmegaConfBaseException as error:
        problems.append(Problem(error.full_key or "config", _first_line(error)))
    except (RecursionError, ValueError, TypeError) as error:
        problems.append(Problem("config", f"an interpolation refers to itself, or to no plain value: {error}"))
    return {}


def _plain(node: Any, path: str, problems: list[Problem]) -> Any:
    if not isinstance(node, DictConfig | ListConfig):
        return node
    values: dict[Any, Any] = {}
    for key in range(len(node)) if isinstance(node, ListConfig) else node:
        here = f"{path}.{key}" if path else str(key)
        values[key] = UNRESOLVED
        try:
            values[key] = _plain(node[key], here, problems)
        except MissingMandatoryValue:
            problems.append(Problem(here, "is missing; replace ??? by a value"))
        except OmegaConfBaseException as error:
            problems.append(Problem(here, _first_line(error)))
    return list(values.values()) if isinstance(node, ListConfig) else values


def _first_line(error: OmegaConfBaseException) -> str:
    """Return the message of a resolver without the types and lines that OmegaConf adds."""
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).partition("\n")[0])


def escaped(value: Any) -> Any:
    """Escape `${` so that OmegaConf reads it as text."""
    if isinstance(value, dict):
        return {key: escaped(part) for key, part in value.items()}
    if isinstance(value, list):
        return [escaped(part) for part in value]
    return _INTERPOLATION.sub(r"\1\1\\\2", value) if isinstance(value, str) else value


@contextmanager
def own_resolvers() -> Generator[None]:
    """Register `${packaged:…}` and an `${oc.env:…}` that reads no secrets, and restore the resolvers afterwards.

    The resolved config is saved with the run, so it must contain no secret.
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
        raise ConfigError(f"{name} looks like a secret, and the config is saved with the run")
    return oc.env(name, *default)


def _packaged(path: str) -> str:
    kind, _, rest = path.partition("/")
    if kind not in ("configs", "data"):
        raise ConfigError(f"packaged files are in configs/ and data/, found {path}")
    return str(packaged(kind) / rest)
