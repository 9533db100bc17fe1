"""Where a model's files come from: a local folder, or a hub repository fetched into the hub's cache.

Either way the rest of the package sees a folder. Only text and safetensors are ever fetched: no pickle, no code.
"""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from finetune.models.families import family_of
from finetune.models.safetensors_index import read_header
from finetune.system.errors import ConfigError, FinetuneError, ResourceError

TEXT_FILES = ("*.json", "*.jinja", "*.txt")
WEIGHT_FILES = ("*.safetensors",)
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A folder of model files; `revision` is the commit it was taken from, None for a local folder."""

    folder: Path
    revision: str | None


def fetch(name: str, revision: str | None, patterns: tuple[str, ...], key: str, download: bool = True) -> Source:
    """The folder that `name` means: itself, or the hub's files of that id at `revision`.

    patterns: globs of the files that are wanted from a hub repository's top folder.
    key: what the user calls the setting (`model.name`), for the messages. download: False takes what is here already.
    Raises: ConfigError naming what to do, ResourceError when the disk is full.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"{key}={name} is a local folder, which has no revisions; drop the revision {revision!r}")
        return Source(folder, None)
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(f"{key}={name}: there is no such folder (looked in {Path.cwd()}), and this is no hub id")
    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
            local_files_only=not download,
        )
    except (hub.HTTPError, hub.HFValidationError, hub.RevisionResolutionError, OSError) as error:
        raise _hub_error(error, name, revision, key) from error
    commit = Path(snapshot).name
    return Source(Path(snapshot), commit if _COMMIT.fullmatch(commit) else revision)


def _hub_error(error: Exception, name: str, revision: str | None, key: str) -> FinetuneError:
    local = "or give a local folder"
    match error:
        case hub.GatedRepoError():
            message = f"is gated: accept its terms on its page, then set HF_TOKEN (or `hf auth login`), {local}"
        case hub.RevisionNotFoundError():
            message = f"has no revision {revision!r}: name one of its branches, tags or commits"
        case hub.RepositoryNotFoundError():
            message = f"is neither a folder here nor a public hub id: check it, set HF_TOKEN if it is private, {local}"
        case hub.LocalEntryNotFoundError() | hub.OfflineModeIsEnabled():
            offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
            why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
            message = f"is no folder here, and is not complete in the cache while {why}: go online once, {local}"
        case OSError(errno=errno.ENOSPC):
            return ResourceError(f"{key}={name}: the disk is full; set HF_HOME to a larger one")
        case _:
            message = f"could not be fetched: {error}; try again, check HF_TOKEN, {local}"
    return ConfigError(f"{key}={name} {message}")


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A base model's config.json, refused unless it is one that the package trains.

    Raises: ConfigError for a missing or broken file, code to import, weights quantized by others, an unknown family.
    """
    config = read_json(folder / "config.json", f"model.name={name}")
    if "auto_map" in config:
        raise ConfigError(f"model.name={name}: its config.json names code to run (auto_map), which is never done")
    family_of(config.get("model_type"), f"model.name={name}")
    if "quantization_config" in config:
        raise ConfigError(f"model.name={name} is quantized already; name its 16-bit original and choose quant.type")
    return config


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON object from a file; ConfigError, opening with `where`, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: {path.parent} has no {path.name}") from error
    except ValueError as error:
        raise ConfigError(f"{where}: {path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: {path} holds no JSON object")
    return content


def weight_files(folder: Path, name: str) -> dict[str, Path]:
    """Which file holds each tensor of a base model. Only headers are read; a header tells whether its file is whole.

    Raises: ConfigError if a file is missing or the weights are a pickle; IntegrityError if a file is torn.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        shards = set(read_json(index, f"model.name={name}").get("weight_map", {}).values())
        files = [folder / shard for shard in sorted(shards)]
    else:
        files = [folder / SINGLE_FILE]
    if missing := [file.name for file in files if not file.is_file()]:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        advice = f"; {pickles[0]} is a pickle, which can run code: convert it to safetensors" if pickles else ""
        raise ConfigError(f"model.name={name}: {folder} lacks {', '.join(missing)}{advice}")
    return {tensor: file for file in files for tensor in tensor_names(file)}


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file; IntegrityError if it is torn or something else."""
    return list(read_header(file)[1])


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, on the CPU."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
