"""The adapters of a server: their names, their folders, and whether they belong to one base. Nothing imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune.config.command_options import ServeOptions
from finetune.config.schema import ModelConfig
from finetune.models.adapters.base_config import recorded_fingerprint
from finetune.models.adapters.folder import find_adapter, read_adapter_config
from finetune.models.digest import base_fingerprint
from finetune.system.console import Log
from finetune.system.errors import ConfigError


def find_adapters(options: ServeOptions) -> dict[str, Path]:
    """Return the folders of the adapters by the names under which they are served.

    Raises:
        ConfigError: lists every adapter that is missing, names that are taken, and too many adapters.
    """
    words = [] if options.adapter is None else [(_default_name(options.adapter), "adapter", options.adapter)]
    words += [(name, f"adapters.{name}", word) for name, word in options.adapters.items()]
    found: dict[str, Path] = {}
    problems, keys = [], {}
    for name, key, word in words:
        if name in keys:
            problems.append(f"{key}: the name {name} is taken by {keys[name]}\nhelp: name each in adapters={{…}}")
        keys.setdefault(name, key)
        try:
            found[name] = find_adapter(word, key)
        except ConfigError as error:
            problems.append(str(error))
    if len(words) > options.serve.max_adapters:
        problems.append(f"serve.max_adapters: {len(words)} adapters are named, found {options.serve.max_adapters}")
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _default_name(word: str) -> str:
    """Return the name of a run folder, a run with its checkpoint, or the last part of a hub id."""
    folder = Path(word).expanduser()
    folder = folder.resolve() if folder.is_dir() else folder
    return f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name


def name_base(model: ModelConfig, adapters: Mapping[str, Path]) -> str:
    """Return the name under which the base is served. Raises: ConfigError if an adapter has it."""
    folder = Path(model.name).expanduser()
    name = folder.resolve().name if folder.is_dir() else model.name
    if name in adapters:
        raise ConfigError(
            f"adapters.{name}: the base is served under this name\nhelp: name the adapter in adapters={{NAME: FOLDER}}"
        )
    return name


def check_bases(adapters: Mapping[str, Path], model: ModelConfig, *, chosen: bool, log: Log) -> None:
    """Compare the base to load with the base of each adapter.

    Args:
        chosen: the user named the base: a difference is logged, and the comparison of log-probabilities decides.

    Raises:
        ConfigError: lists every adapter of another base.
    """
    here = base_fingerprint(model.name)
    problems = []
    for name, folder in adapters.items():
        named = read_adapter_config(folder, f"adapters.{name}").get("base_model_name_or_path") or ""
        then = recorded_fingerprint(folder)
        if then is not None and here is not None:
            if then != here:
                problems.append(f"adapters.{name}={folder}: was trained on other weights than those of {model.name}")
        elif named and Path(named).name.lower() != Path(model.name).name.lower():
            problems.append(f"adapters.{name}={folder}: was trained on {named}, found model.name={model.name}")
    if problems and not chosen:
        help_line = "help: serve each base by a server of its own, or name the base with model="
        raise ConfigError("\n".join([*problems, help_line]))
    for problem in problems:
        log(f"WARNING: {problem}")
