"""Adapter folders and the checkpoints of a run, found without torch."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from finetune.models.hub import TEXT_FILES, fetch
from finetune.system.errors import ConfigError
from finetune.system.manifest import check_files

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
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


def list_checkpoints(run: Path) -> list[Path]:
    """Return the finished checkpoint folders of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in run.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]
