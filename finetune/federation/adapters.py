"""Adapters of parties: how two of them differ, what is known of their base, and the folder that a round writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.config.compose import saved_config
from finetune.export.staging import TOKENIZER_COPIES, copy_files
from finetune.models.adapters.base_config import recorded_fingerprint
from finetune.models.adapters.files import SavedAdapter, check_adapter, scaling_of, token_ids
from finetune.models.adapters.folder import CONFIG_FILE, ROUND_FILE, TENSOR_FILE
from finetune.models.adapters.names import PREFIX, is_factor
from finetune.models.safetensors_index import save_tensors
from finetune.system.atomic import write_text
from finetune.system.errors import ConfigError
from finetune.system.manifest import record_files

BASE_COPY = ".base_layer."  # in the name of a tensor that PEFT saves with an adapted head, and that is not trained
_A = ".lora_A.weight"
_SHOWN, _LONGEST = 3, 120


def scalings_of(adapter: SavedAdapter) -> dict[str, float]:
    """Return the factor of B A, by the full name of the module in the adapter's file."""
    modules = {name.removesuffix(_A): len(tensor) for name, tensor in adapter.tensors.items() if name.endswith(_A)}
    return {name: scaling_of(adapter.config, name.removeprefix(PREFIX), rank) for name, rank in modules.items()}


def differences_of(adapter: SavedAdapter, other: SavedAdapter) -> list[str]:
    """Return how the kind of an adapter differs from that of another; equal kinds can be averaged and subtracted."""
    there = f"{other.name} has"
    problems = [
        f"{key}: found {str(found)[:_LONGEST]}, {there} {str(wanted)[:_LONGEST]}"
        for key, found, wanted in (
            *(
                (key, adapter.config.get(key), other.config.get(key))
                for key in ("r", "lora_alpha", "init_lora_weights")
            ),
            ("new tokens", token_ids(adapter.config), token_ids(other.config)),
        )
        if found != wanted
    ]
    problems += _other_base(adapter, other)
    problems += _other_tensors(adapter.tensors, other.tensors, there)
    if not problems and (scalings := scalings_of(adapter)) != (wanted := scalings_of(other)):
        module = next(module for module in scalings if scalings[module] != wanted[module])
        problems.append(f"alpha: {module} is scaled by {scalings[module]:g}, {there} {wanted[module]:g}")
    if not problems:
        problems += _other_texts(adapter, other)
    return problems


def require_zero_start(adapter: SavedAdapter) -> None:
    """Check that all trained tensors of an adapter started from zero. Raises: ConfigError."""
    more = [name for name in adapter.tensors if not is_factor(name) and BASE_COPY not in name]
    if more:
        raise ConfigError(
            f"start: is missing; {listed(more)} did not start from zero\n"
            "help: share one adapter before the first round: lora.init_adapter=START at every party, and start=START"
        )


def base_record(adapter: SavedAdapter) -> dict[str, Any]:
    """Return what is known of an adapter's base: name, fingerprint, and how training stored it; null where unknown."""
    config = saved_config(adapter.folder)
    return {
        "name": adapter.config.get("base_model_name_or_path"),
        "fingerprint": recorded_fingerprint(adapter.folder),
        "quant": config.quant.type if config is not None else read_round(adapter.folder).get("base", {}).get("quant"),
    }


def read_round(folder: Path) -> dict[str, Any]:
    """Return the record of `finetune clip` or `finetune aggregate` in a folder; {} without one."""
    try:
        found = json.loads((folder / ROUND_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("base", {}), dict) else {}


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    texts: Path | None = None,
) -> None:
    """Fill an existing folder with an adapter that other commands and PEFT load, and read it back.

    Args:
        tensors, config: content of the adapter's two files.
        record: content of federation.json.
        texts: a folder whose tokenizer and chat template are copied.

    Raises:
        IntegrityError: the written adapter is not the one in memory.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(whole, folder / TENSOR_FILE, metadata={"format": "pt"})
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(folder / ROUND_FILE, json.dumps(record, indent=2) + "\n")
    if texts is not None:
        copy_files(texts, folder, TOKENIZER_COPIES)
    record_files(folder, [CONFIG_FILE, TENSOR_FILE, ROUND_FILE, *TOKENIZER_COPIES])
    check_adapter(folder, trained=False)


def _other_base(adapter: SavedAdapter, other: SavedAdapter) -> Iterator[str]:
    """Compare names by their last part, since parties have the base at different places, and known fingerprints."""
    names = [str(each.config.get("base_model_name_or_path")) for each in (adapter, other)]
    prints = [recorded_fingerprint(each.folder) for each in (adapter, other)]
    if None not in prints:
        if prints[0] != prints[1]:
            yield f"base: {names[0][:_LONGEST]} has other weights than that of {other.name}"
    elif Path(names[0]).name.lower() != Path(names[1]).name.lower():
        yield f"base: found {names[0][:_LONGEST]}, {other.name} has {names[1][:_LONGEST]}"


def _other_tensors(here: Mapping[str, Tensor], there: Mapping[str, Tensor], owner: str) -> Iterator[str]:
    if missing := [name for name in there if name not in here]:
        yield f"tensors: {listed(missing)} missing"
    if more := [name for name in here if name not in there]:
        yield f"tensors: {listed(more)} more than {owner}"
    for name in here.keys() & there.keys():
        if here[name].shape != there[name].shape:
            yield f"tensors: {name[:_LONGEST]} has shape {list(here[name].shape)}, {owner} {list(there[name].shape)}"
            return
        if BASE_COPY in name and not torch.equal(here[name], there[name]):
            yield f"tensors: {name}, a copy of the base's, differs"
            return


def _other_texts(adapter: SavedAdapter, other: SavedAdapter) -> Iterator[str]:
    """Compare chat templates, and tokenizers where rows of new tokens are trained: ids must mean the same tokens."""
    names = ["chat_template.jinja", *(["tokenizer.json"] if token_ids(adapter.config) else [])]
    for name in names:
        files = [each.folder / name for each in (adapter, other)]
        if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
            yield f"{name}: differs from that of {other.name}"


def listed(names: Sequence[str]) -> str:
    """Return the first names of a list and the number of the others; names in a party's files can be of any length."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:_LONGEST] for name in names[:_SHOWN]) + more
