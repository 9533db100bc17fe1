"""Interpolations of a composed config -> plain values, leaf by leaf, so that one bad value hides no other."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from omegaconf.resolvers import oc

from finetune.config.problems import Problem
from finetune.system.errors import ConfigError
from finetune.system.resources import packaged

_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_INTERPOLATION = re.compile(r"(\\*)(\$\{)")
UNRESOLVED = object()


def resolved(tree: dict[str, Any], problems: list[Problem]) -> Any:
    """The tree without interpolations; UNRESOLVED stands for a value that is missing or cannot be resolved."""
    try:
        with guarded_environment():
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
def guarded_environment() -> Generator[None]:
    """`${oc.env:NAME}` works, but not for secrets: the resolved config is saved with the run."""
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _environment(name: str, *default: Any) -> str | None:
    if _SECRET.search(name):
        raise ConfigError(f"{name} looks like a secret, and a config is saved with its run")
    return oc.env(name, *default)


def _packaged(path: str) -> str:
    kind, _, rest = path.partition("/")
    if kind not in ("configs", "data"):
        raise ConfigError(f"packaged files are configs/… and data/…, not {path}")
    return str(packaged(kind) / rest)


OmegaConf.register_new_resolver("packaged", _packaged, replace=True)
