"""Adapter folders and the checkpoints of a run, found without torch."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.models.hub import TEXT_FILES, fetch, read_json
from finetune.system.errors import ConfigError
from finetune.system.manifest import check_files

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
# What an adapter of a federated round is made of; the base in it has the form of run.json's.
ROUND_FILE = "federation.json"
_LARGEST = 2**31
_Rank = Annotated[int, Field(ge=1, le=_LARGEST)]
_Alpha = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
_Index = Annotated[int, Field(ge=0, le=_LARGEST)]


class _Settings(BaseModel):
    """The settings of adapter_config.json that are read here, and the one with which PEFT imports a module by name."""

    model_config = ConfigDict(strict=True)

    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: _Rank = 8
    rank_pattern: dict[str, _Rank] | None = None
    lora_alpha: _Alpha = 8
    alpha_pattern: dict[str, _Alpha] | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: dict[str, list[_Index]] | list[_Index] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    megatron_config: None = None


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_adapter(name: str, key: str) -> Path:
    """Return the folder of an adapter, downloaded if `name` is a hub id. key: the config key of `name`, for messages.

    Raises:
        ConfigError: there is no adapter; for a run without one, the help line names its newest checkpoint.
    """
    folder = fetch(name, None, (CONFIG_FILE, TENSOR_FILE, *TEXT_FILES), key).folder
    check_adapter_folder(folder, key)
    return folder


def check_adapter_folder(folder: Path, key: str) -> None:
    """Check that a folder holds an adapter, and its settings against the manifest of its run.

    The tensors are checked where they are read. key: the config key of the folder, for messages.

    Raises:
        ConfigError: there is no adapter.
        IntegrityError: the settings were altered.
    """
    missing = [name for name in (CONFIG_FILE, TENSOR_FILE) if not (folder / name).is_file()]
    if not missing:
        check_files(folder, [CONFIG_FILE])
        return
    if checkpoints := list_checkpoints(folder):
        raise ConfigError(f"{key}={folder}: the run has no final adapter yet\nhelp: {key}={checkpoints[-1]}")
    if not folder.is_dir():
        raise ConfigError(f"{key}={folder}: not a folder (looked in {Path.cwd()})")
    file, pickle = folder / PICKLE_FILE, ""
    if file.is_file() and missing == [TENSOR_FILE]:
        out = f"{folder}-safetensors"
        pickle = f", only a pickle\nhelp: finetune migrate {shlex.quote(str(file))} out={shlex.quote(out)}"
    raise ConfigError(f"{key}={folder}: not an adapter, it has no {' and no '.join(missing)}{pickle}")


def read_adapter_config(folder: Path, where: str) -> dict[str, Any]:
    """Read the settings of a LoRA adapter.

    Args:
        folder: of the adapter.
        where: the config key and value that name it, for messages.

    Raises:
        ConfigError: the file is missing, is of another kind of adapter, or lists each setting with a wrong value.
    """
    config = read_json(folder / CONFIG_FILE, where)
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: not a LoRA adapter, found {str(config.get('peft_type'))[:80]}")
    try:
        _Settings.model_validate(config)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, each['loc']))[:80]}: {each['msg']}, found {str(each['input'])[:80]}"
            for each in error.errors()
        ]
        raise ConfigError("\n".join([f"{where}: {folder / CONFIG_FILE} is not valid:", *wrong[:10]])) from error
    for pattern in (*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{where}: {pattern[:80]} in a pattern of {CONFIG_FILE} is no regex: {error}") from error
    return config


def list_checkpoints(run: Path) -> list[Path]:
    """Return the finished checkpoint folders of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in run.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]
