"""Load a function of the user, by a word of the command line.

Security: this runs the user's code, so a word never comes from a config, a dataset or a model.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.system.errors import ConfigError


@dataclass(frozen=True)
class UserFunction:
    """A function of the user. digest: SHA-256 of the file that defines it; None if there is no such file."""

    name: str
    call: Callable[..., Any]
    digest: str | None


def load_function(key: str, word: str) -> UserFunction:
    """Load `FILE.py:NAME` or `module:NAME`.

    Args:
        key: the option that holds the word, for messages.

    Raises:
        ConfigError: the word has another form, the file or module is missing or fails, or has no such function.
    """
    place, _, name = word.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"{key}: expected FILE.py:NAME or module:NAME, found {word}")
    module = _run_file(f"{key}={word}", place) if place.endswith(".py") else _import(f"{key}={word}", place)
    if not callable(function := getattr(module, name, None)):
        has = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        found = "" if function is None else f", found {type(function).__name__}"
        raise ConfigError(
            f"{key}={word}: {place} has no function {name}{found}\nhelp: it has {', '.join(has) or 'none'}"
        )
    return UserFunction(name, function, digest_of(module))


def digest_of(module: ModuleType | None) -> str | None:
    """Return the SHA-256 of the file of a module; None if it has no file."""
    file = Path(getattr(module, "__file__", None) or "")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _run_file(setting: str, place: str) -> ModuleType:
    file = Path(place).expanduser()
    if not file.is_file():
        raise ConfigError(f"{setting}: the file {file} does not exist")
    # Its own name in sys.modules lets dataclasses and pickle find what the file defines.
    name = f"finetune_user_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{setting}: {file} cannot be run: {type(error).__name__}: {error}") from error
    return module


def _import(setting: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except Exception as error:
        advice = "\nhelp: write a file as FILE.py:NAME" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(f"{setting}: cannot import {place}: {type(error).__name__}: {error}{advice}") from error
