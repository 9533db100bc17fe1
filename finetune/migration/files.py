"""Read the config of another framework: a YAML or JSON file, or a shell script with its command."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from finetune.data.formats.detection import is_registry
from finetune.system.errors import InputError

Peer = Literal["axolotl", "llama-factory", "ms-swift", "trl", "unsloth"]
PEERS: tuple[Peer, ...] = get_args(Peer)

# Names that only one framework has; the first match counts.
_TELLING: dict[Peer, frozenset[str]] = {
    "axolotl": frozenset({"base_model", "sequence_len", "sample_packing", "lora_target_linear"}),
    "llama-factory": frozenset({"finetuning_type", "lora_target", "cutoff_len", "stage", "dataset_dir"}),
    "ms-swift": frozenset({"train_type", "tuner_type", "sft_type", "split_dataset_ratio", "model_id_or_path"}),
    "unsloth": frozenset({"max_seq_length", "use_gradient_checkpointing", "random_state", "model_name"}),
    "trl": frozenset({"model_name_or_path", "dataset_name", "use_peft", "lora_r"}),
}
# The calls of an Unsloth notebook, whose arguments a JSON file may hold one by one.
_CALLS = frozenset({"from_pretrained", "get_peft_model", "sftconfig", "trainingarguments", "sfttrainer", "args"})
_COMMANDS = re.compile(r"(swift sft|swift/cli/sft\.py|trl sft|\bsft\.py|llamafactory-cli train|axolotl train)(\s.*)?$")
_PROCESSES = re.compile(r"\b(?:NPROC_PER_NODE|nproc_per_node|--num_processes)[= ](\d+)")


@dataclass(frozen=True)
class PeerConfig:
    """The settings of another framework, by their names there.

    processes: number of processes that the script starts, else 1.
    """

    file: Path
    peer: Peer
    settings: Mapping[str, Any]
    processes: int = 1


def read_peer_config(file: Path, framework: str = "auto") -> PeerConfig:
    """Read a config and recognize its framework.

    Args:
        file: YAML, JSON or shell script.
        framework: a word of `Peer`; auto recognizes it by its keys.

    Raises:
        InputError: the file cannot be read, or its framework is not recognized.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    command, processes = "", 1
    if file.suffix in (".sh", ".bash", ".cmd", ".txt"):
        command, settings = _script(file, text)
        processes = max((int(number) for number in _PROCESSES.findall(text)), default=1)
    else:
        settings = _document(file, text)
    for call in [name for name in settings if name.lower() in _CALLS and isinstance(settings[name], Mapping)]:
        settings |= settings.pop(call)
    peer = next((known for known in PEERS if known == framework), None)
    peer = peer or ("ms-swift" if "swift" in command else None) or _recognized(settings)
    if peer is None:
        raise InputError(
            f"{file}: is not a config of {', '.join(PEERS)}; its keys: {', '.join(settings) or 'none'}\n"
            f"help: name the framework, as framework={PEERS[0]}"
        )
    return PeerConfig(file, peer, settings, processes)


def _recognized(settings: Mapping[str, Any]) -> Peer | None:
    if is_registry(settings):
        return "llama-factory"
    return next((peer for peer, names in _TELLING.items() if not names.isdisjoint(settings)), None)


def _document(file: Path, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{file}: is not valid {'JSON' if file.suffix == '.json' else 'YAML'}: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{file}: expected names and values, found {type(document).__name__}")
    return {str(name): value for name, value in document.items()}


def _script(file: Path, text: str) -> tuple[str, dict[str, Any]]:
    """Return the command of a script and its flags; a flag with several values becomes a list."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]
    found = next((match for line in lines if (match := _COMMANDS.search(line))), None)
    if found is None:
        raise InputError(f"{file}: no training command in it (swift sft, trl sft, sft.py)")
    try:
        words = shlex.split(re.sub(r"\$\(.*?\)", "$()", found[2] or ""))
    except ValueError as error:
        raise InputError(f"{file}: the command cannot be read: {error}") from error
    config = next((word for word in words if word.endswith((".yaml", ".yml"))), None)
    if config is not None:
        raise InputError(f"{file}: the settings are in {config}\nhelp: finetune migrate {config}")
    settings: dict[str, list[Any]] = {}
    values: list[Any] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = settings.setdefault(name.replace("-", "_"), [])
            values += [_scalar(value)] if equals else []
        else:
            values.append(_scalar(word))
    return found[1], {
        name: True if not values else values[0] if len(values) == 1 else values for name, values in settings.items()
    }


def _scalar(word: str) -> Any:
    """Return a number or a truth value; every other word stays text."""
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    return value if isinstance(value, bool | int | float) else word
