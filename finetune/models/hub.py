"""Model files: from a local folder, or from a hub repository downloaded into the hub cache.

Both give a folder. Only text and safetensors files are downloaded: no pickle, no code. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download

from finetune.config.schema import ModelConfig
from finetune.models.families import SHAPE_KEYS, ModelFamily, attention_window, family_of, text_settings
from finetune.models.safetensors_header import read_header
from finetune.system.errors import ConfigError, FinetuneError, ResourceError

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
TEXT_FILES = ("*.json", "*.jinja", "*.txt")
WEIGHT_FILES = ("*.safetensors",)
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_SIZE_KEYS = tuple(key for key in SHAPE_KEYS if key != "tie_word_embeddings")
_LARGEST_SIZE, _MOST_LAYERS = 2**24, 2**10
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PLAIN_FILE = re.compile(r"[\w.-]{1,240}\.safetensors")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A folder of model files. `revision` is its hub commit, or None for a local folder."""

    folder: Path
    revision: str | None


class TensorFile(NamedTuple):
    """The file of a tensor, and its name there."""

    file: Path
    name: str


def fetch(name: str, revision: str | None, patterns: tuple[str, ...], key: str, download: bool = True) -> Source:
    """Return the folder `name`, or download the hub repository `name` at `revision`.

    Args:
        name: local folder or hub id.
        revision: of a hub repository.
        patterns: globs of the files to download from its top folder.
        key: the config key of `name`, for messages.
        download: False uses only the local cache.

    Raises:
        ConfigError: not found, with what to do.
        ResourceError: the disk is full.
    """
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        if revision is not None:
            raise ConfigError(f"{key}={name}: a local folder has no revisions, found {revision!r}\nhelp: remove it")
        return Source(folder, None)
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(f"{key}={name}: not a folder (looked in {Path.cwd()}) and not a hub id")
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
            message = (
                "the repository is gated\nhelp: accept its terms on its page, then set HF_TOKEN (or run "
                f"`hf auth login`), {local}"
            )
        case hub.RevisionNotFoundError():
            message = f"no such revision, found {revision!r}\nhelp: name a branch, tag or commit"
        case hub.RepositoryNotFoundError():
            message = (
                "neither a local folder nor a public hub id\nhelp: check the name, set HF_TOKEN if it is private, "
                f"{local}"
            )
        case hub.LocalEntryNotFoundError() | hub.OfflineModeIsEnabled():
            offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
            why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
            message = f"not a local folder, and not complete in the cache while {why}\nhelp: go online once, {local}"
        case OSError(errno=errno.ENOSPC):
            return ResourceError(f"{key}={name}: the disk is full\nhelp: set HF_HOME to a larger disk")
        case _:
            message = f"download failed: {error}\nhelp: try again, check HF_TOKEN, {local}"
    return ConfigError(f"{key}={name}: {message}")


def check_model(cfg: ModelConfig) -> None:
    """Check `model` before torch is imported. At most text files are downloaded.

    Raises:
        ConfigError: the model or its tokenizer is not found, is not supported, or lacks files.
        IntegrityError: a local weight file is corrupt.
    """
    source = find_texts(cfg.name, cfg.revision, "model.name")
    read_config(source.folder, cfg.name)
    if source.revision is None:
        weight_files(source.folder, cfg.name)
    if cfg.tokenizer is not None:
        find_texts(cfg.tokenizer, None, "model.tokenizer")


def find_texts(name: str, revision: str | None, key: str) -> Source:
    """Return the text files of a model: from the cache if they are there, so that a check needs no network."""
    try:
        return fetch(name, revision, TEXT_FILES, key, download=False)
    except ConfigError:
        return fetch(name, revision, TEXT_FILES, key)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read the config.json of a base model.

    Raises:
        ConfigError: the file is missing or invalid, names code to run, or is of a quantized model or unsupported
            family.
    """
    config = read_json(folder / "config.json", f"model.name={name}")
    if "auto_map" in config:
        raise ConfigError(f"model.name={name}: config.json names code to run (auto_map), which is never executed")
    family_of(config.get("model_type"), f"model.name={name}")
    _check_sizes(text_settings(config), f"model.name={name}")
    if "quantization_config" in config:
        raise ConfigError(f"model.name={name}: already quantized\nhelp: name the 16-bit original and set quant.type")
    return config


def _check_sizes(settings: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for sizes of a decoder that no model has: nothing is built from them."""
    for key in _SIZE_KEYS:
        found, most = settings.get(key), _MOST_LAYERS if key == "num_hidden_layers" else _LARGEST_SIZE
        if found is not None and not (type(found) is int and 0 < found <= most):
            raise ConfigError(
                f"{where}: {key} in config.json must be a whole number from 1 to {most:,}, found {str(found)[:80]}"
            )


def check_window(config: Mapping[str, Any], name: str, tokens: int, key: str) -> None:
    """Raise ConfigError if the attention of a model does not reach back `tokens` tokens; segmented attention does.

    Args:
        config: of `read_config`.
        name: of the model.
        key: what has this length, for the message.
    """
    window = attention_window(text_settings(config))
    if window is not None and window < tokens:
        raise ConfigError(
            f"{key}: {name} attends to the last {window:,} tokens alone, found {tokens:,}\n"
            f"help: set data.max_length={window}, or model.attention=sdpa, which has a window"
        )


def read_json(path: Path, where: str) -> dict[str, Any]:
    """Read a JSON object from a file. Raises: ConfigError, prefixed with `where`, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: {path.parent} has no {path.name}") from error
    except OSError as error:
        raise ConfigError(f"{where}: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: {path} is not a JSON object")
    return content


def weight_files(folder: Path, name: str) -> dict[str, Path]:
    """Return the file of each tensor of a base model. Only headers are read, which show whether a file is complete.

    Raises:
        ConfigError: a file is missing or the weights are a pickle.
        IntegrityError: a file is corrupt.
    """
    index, files = folder / INDEX_FILE, [folder / SINGLE_FILE]
    if index.is_file():
        files = [folder / shard for shard in _shards(read_json(index, f"model.name={name}"), f"model.name={name}")]
    if missing := [file.name for file in files if not file.is_file()]:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        advice = f"\nhelp: {pickles[0]} is a pickle, which can run code: convert it to safetensors" if pickles else ""
        listed = f", which {INDEX_FILE} lists" if index.is_file() else ""
        raise ConfigError(f"model.name={name}: {folder} lacks {', '.join(missing)}{listed}{advice}")
    return {tensor: file for file in files for tensor in read_header(file)[1]}


def _shards(index: Mapping[str, Any], where: str) -> list[str]:
    """Return the names of the files in an index. Raises: ConfigError for anything but files beside it."""
    places = index.get("weight_map")
    if not isinstance(places, dict):
        raise ConfigError(
            f"{where}: {INDEX_FILE} has no weight_map of tensors and files, found {type(places).__name__}"
        )
    for tensor, shard in places.items():
        if not isinstance(shard, str) or not _PLAIN_FILE.fullmatch(shard):
            raise ConfigError(
                f"{where}: {INDEX_FILE} names no safetensors file of its own folder for {tensor[:80]!r}, found "
                f"{str(shard)[:80]!r}\nhelp: download the model again"
            )
    return sorted(set(places.values()))


def named_in_model(files: Mapping[str, Path], family: ModelFamily) -> dict[str, TensorFile]:
    """Return the tensors of `weight_files` by their names in the model; parts that it leaves out are not among them."""
    names = {name: family.name_in_model(name) for name in files}
    return {ours: TensorFile(files[name], name) for name, ours in names.items() if ours is not None}
