"""The datasets that a config of another framework names, as items of data.train and data.eval."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.config.schema import SourceConfig
from finetune.data.formats.attachments import MEDIA_COLUMNS
from finetune.migration.files import PeerConfig

Source = dict[str, Any]
Notes = list[str]
# A format, or a style of prompt, and the format here; other words stay "auto".
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "pretrain": "text"}
_FIELDS = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_tools": "tools",
    "field": "text",
}
# Columns of LLaMA-Factory's dataset_info.json.
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_COLUMNS |= {name: name for name in ("history", "system", "tools", *MEDIA_COLUMNS)}
_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool"}
_SLICE = re.compile(r"(?P<split>[^\[]+)\[:(?P<count>\d+)(?P<percent>%?)\]")
_OPENAI_KEYS, _SHAREGPT_KEYS = ("role", "content"), ("from", "value")


def read_sources(config: PeerConfig, notes: Notes) -> tuple[list[Source], list[Source]]:
    """Return the training and the evaluation sources; `notes` gets a line for what is lost.

    The names that hold datasets are those of `DATASET_NAMES`.
    """
    settings = config.settings
    if config.peer == "axolotl":
        train = [_axolotl(entry, notes) for entry in listed(settings.get("datasets"))]
        return train, [_axolotl(entry, notes) for entry in listed(settings.get("test_datasets"))]
    if config.peer == "llama-factory":
        return tuple([*_registered(config, name, notes)] for name in ("dataset", "eval_dataset"))  # type: ignore[return-value]
    if config.peer == "ms-swift":
        train = [_swift(str(entry)) for entry in listed(settings.get("dataset"))]
        return train, [_swift(str(entry)) for entry in listed(settings.get("val_dataset"))]
    if mixture := settings.get("datasets"):
        return [_without_none(_hub(entry)) for entry in listed(mixture) if isinstance(entry, Mapping)], []
    column = settings.get("dataset_text_field")
    text = {"format": "text", "columns": {"text": column} if column != "text" else None} if column else {}
    if not (path := settings.get("dataset_name")):
        notes.append("data.train: no dataset is named; replace rows.jsonl by yours")
        return [_without_none({"path": "rows.jsonl"} | text)], []
    subset = settings.get("dataset_config") or settings.get("dataset_config_name")
    source = _without_none({"path": str(path), "subset": subset} | text)
    split = "train" if _is_file(str(path)) else settings.get("dataset_train_split", "train")
    train = [source if _is_file(str(path)) else source | {"split": split}]
    wants_eval = settings.get("eval_strategy", "no") not in ("no", False)
    held_out = [source | {"split": settings.get("dataset_test_split", "test")}] if wants_eval else []
    return train, held_out


def read_registry(config: PeerConfig, notes: Notes) -> list[Source]:
    """Return each dataset of a dataset_info.json as a source; `notes` gets a line for each one that is left out."""
    sources = []
    for name, entry in config.settings.items():
        before = len(notes)
        source = {"name": name} | _registry_entry(entry, config.file.parent, name, notes)
        if len(notes) > before:
            notes[-1] += ", so it is left out"
            continue
        try:
            SourceConfig.model_validate(source)
        except ValidationError as error:
            notes.append(f"dataset: {name}: {'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}")
        else:
            sources.append(source)
    return sources


DATASET_NAMES = frozenset(
    "datasets test_datasets dataset eval_dataset dataset_dir val_dataset dataset_name dataset_config "
    "dataset_config_name dataset_train_split dataset_test_split dataset_text_field max_samples".split()
)


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return names and values; none, if there is something else in their place."""
    return {str(name): each for name, each in value.items()} if isinstance(value, Mapping) else {}


def listed(value: Any) -> list[Any]:
    """Return a list as it is, one value as a list of it, and nothing as an empty list."""
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def _without_none(source: Mapping[str, Any]) -> Source:
    return {key: value for key, value in source.items() if value not in (None, "", {}, [])}


def _is_file(path: str) -> bool:
    return bool(re.search(r"\.(jsonl?|csv|tsv|parquet|arrow|txt)(\.\w+)?$", path))


def _hub(entry: Mapping[str, Any]) -> Source:
    return {"path": entry.get("path"), "subset": entry.get("name"), "split": entry.get("split", "train")}


def _axolotl(entry: Any, notes: Notes) -> Source:
    if not isinstance(entry, Mapping):
        return {"path": str(entry)}
    files = listed(entry.get("data_files"))
    path = str(
        files[0] if files and entry.get("path") in (None, "json", "csv", "parquet") else entry.get("path", "???")
    )
    if len(files) > 1:
        notes.append(f"datasets: {path}: one file of {len(files)}; add an item for each of the others")
    kind = entry.get("type")
    style = kind if isinstance(kind, str) else ""
    described = {**_mapping(kind), **entry}
    columns = {ours: described[theirs] for theirs, ours in _FIELDS.items() if described.get(theirs)}
    keys = dict(_mapping(entry.get("message_property_mappings")))
    keys |= {ours: theirs for ours in _OPENAI_KEYS if (theirs := entry.get(f"message_field_{ours}"))}
    of_sharegpt = tuple(map(keys.get, _OPENAI_KEYS)) == _SHAREGPT_KEYS
    if not of_sharegpt:
        columns |= {ours: theirs for ours, theirs in keys.items() if ours != theirs}
    if turns := entry.get("field_messages"):
        ours = "conversations" if of_sharegpt else "messages"
        columns |= {ours: turns} if turns != ours else {}
    roles = {ours: listed(theirs) for ours, theirs in _mapping(entry.get("roles")).items()}
    known = next((fmt for word, fmt in _FORMATS.items() if style.partition(".")[0].startswith(word)), None)
    source: Source = {"path": path, "subset": entry.get("name"), "columns": columns, "format": known}
    source["roles"] = {ours: theirs for ours, theirs in roles.items() if theirs != [ours]}
    source["revision"] = entry.get("revision")
    if not _is_file(path) and not os.path.exists(path):
        source |= _split(str(entry.get("split") or "train"), path, notes)
    if style and known is None and style not in ("chat_template", "input_output"):
        notes.append(f"datasets: type: {style}: the format is recognized by the columns; map others with columns")
    return _without_none(source)


def _split(split: str, path: str, notes: Notes) -> Source:
    if (found := _SLICE.fullmatch(split)) is None:
        return {"split": split}
    if found["percent"]:
        notes.append(f"datasets: {path}: split: {split}: all examples are taken; set limit to a number of examples")
        return {"split": found["split"]}
    return {"split": found["split"], "limit": int(found["count"])}


def _swift(entry: str) -> Source:
    """Read `id[:subset][#count]`, or a file with an optional count."""
    path, _, count = entry.partition("#")
    path, _, subset = path.partition(":") if not _is_file(path) else (path, "", "")
    source: Source = {"path": path, "subset": subset, "split": None if _is_file(path) else "train"}
    return _without_none(source | {"limit": int(count) if count.isdecimal() else None})


def _registered(config: PeerConfig, name: str, notes: Notes) -> Iterator[Source]:
    """Look names of datasets up in dataset_info.json, beside the config or in the working directory."""
    value = config.settings.get(name)
    names = [part.strip() for entry in listed(value) for part in str(entry).split(",") if part.strip()]
    if not names:
        return
    folder = Path(str(config.settings.get("dataset_dir") or "data"))
    places = [folder, config.file.parent / folder, config.file.parent]
    registry = next(
        (place / "dataset_info.json" for place in places if os.path.isfile(place / "dataset_info.json")), None
    )
    known: Any = {}
    if registry is not None:
        try:
            known = json.loads(registry.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            notes.append(f"{registry}: cannot be read: {error}")
    else:
        notes.append(f"{name}: no {folder}/dataset_info.json found; check the paths of data")
    for dataset in names:
        entry = known.get(dataset) if isinstance(known, dict) else None
        if isinstance(entry, Mapping):
            yield _registry_entry(entry, registry.parent if registry else folder, dataset, notes)
        elif _is_file(dataset):
            yield {"path": dataset}
        else:
            yield {"path": str(folder / f"{dataset}.json")}


def _registry_entry(entry: Mapping[str, Any], folder: Path, dataset: str, notes: Notes) -> Source:
    for lost in ("ranking", "kto_tag"):
        if entry.get(lost) or _mapping(entry.get("columns")).get(lost):
            notes.append(f"dataset: {dataset}: {lost}: no counterpart")
    columns, tags = _mapping(entry.get("columns")), _mapping(entry.get("tags"))
    of_openai = (tags.get("role_tag"), tags.get("content_tag")) == _OPENAI_KEYS
    mapped = {ours: columns[theirs] for theirs, ours in _COLUMNS.items() if columns.get(theirs, ours) != ours}
    of_hub = entry.get("hf_hub_url") or entry.get("ms_hub_url")
    place = of_hub or entry.get("file_name")
    if not isinstance(place, str):
        notes.append(f"dataset: {dataset}: names no file and no dataset of a hub")
        place = dataset
    source: Source = {"path": place if of_hub else str(folder / place)}
    if entry.get("formatting") == "sharegpt":
        source["format"] = "messages" if of_openai else "sharegpt"
        turns, role, content = ("messages", *_OPENAI_KEYS) if of_openai else ("conversations", *_SHAREGPT_KEYS)
        names = {turns: columns.get("messages", "conversations")}
        names |= {role: tags.get("role_tag", role), content: tags.get("content_tag", content)}
        mapped = {ours: column for ours, column in mapped.items() if ours in ("system", "tools", *MEDIA_COLUMNS)}
        mapped |= {ours: theirs for ours, theirs in names.items() if theirs != ours}
        source["roles"] = {role: tags[tag] for tag, role in _TAGS.items() if tags.get(tag, role) != role}
    elif columns.get("prompt") and not columns.get("response"):
        source["format"], mapped = "text", {} if columns["prompt"] == "text" else {"text": columns["prompt"]}
    else:
        source["format"] = "alpaca"
    source["columns"] = mapped
    if "file_name" not in entry:
        source |= {"subset": entry.get("subset"), "split": entry.get("split") or "train"}
    return _without_none(source | {"limit": entry.get("num_samples")})
