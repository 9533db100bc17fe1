"""A config file and its overrides -> one validated RunConfig."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from finetune.resources import packaged

OmegaConf.register_new_resolver("packaged", lambda path: str(packaged(*path.split("/")[:1]).parent / path), replace=True)


def load_config(path_or_name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a config file and `key=value` overrides describe.

    Raises: ConfigError.
    """
    file = _find(path_or_name)
    try:
        tree = _compose(file, overrides)
        return RunConfig.model_validate(tree)
    except (ValidationError, HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {error}") from error


def to_yaml(config: RunConfig) -> str:
    """The resolved YAML, which load_config reads back to an equal RunConfig."""
    return OmegaConf.to_yaml(config.model_dump())


def _find(name: str) -> Path:
    for folder in (Path.cwd(), Path.cwd() / "configs", packaged("configs")):
        for file in (folder / name, folder / f"{name}.yaml"):
            if file.is_file():
                return file.resolve()
    raise ConfigError(f"no config {name!r}")


def _compose(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    parsed = OverridesParser.create().parse_overrides([*overrides])
    groups = [o.input_line for o in parsed if o.key_or_group in RunConfig.model_fields and isinstance(o.value(), str)
              and o.key_or_group not in ("name", "output_dir")]
    with initialize_config_dir(str(file.parent), version_base="1.3"):
        config = compose(file.stem, [f"hydra.searchpath=['file://{packaged('configs')}']", *groups])
    OmegaConf.set_struct(config, False)
    base = OmegaConf.create({"name": file.stem, "output_dir": "outputs/${name}"})
    config = OmegaConf.merge(base, config)
    for override in parsed:
        if override.input_line not in groups:
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    return OmegaConf.to_container(config, resolve=True)
