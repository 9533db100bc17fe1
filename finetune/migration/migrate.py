"""Translate the settings of another framework, and write them as the config of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from finetune.config.compose import escaped
from finetune.config.explain import problems_of, shown
from finetune.config.keys import find
from finetune.config.peers import REFUSED
from finetune.config.schema import RunConfig
from finetune.data.formats.detection import is_registry
from finetune.migration.datasets import DATASET_NAMES, listed, read_registry, read_sources
from finetune.migration.files import PeerConfig
from finetune.migration.settings import (
    DEFAULTS,
    KNOWN_OBJECTIVES,
    MICRO_BATCH,
    OBJECTIVES,
    OF_ONE_FRAMEWORK,
    RULES,
    UNNEEDED,
    Rule,
    same_meaning,
)
from finetune.migration.sharding import SHARDING_NAMES, read_sharding
from finetune.system.errors import InputError

_MICRO = ("micro_batch_size", "per_device_train_batch_size", "batch_size")
_ACCUMULATION = ("gradient_accumulation_steps", "grad_accum")
_TRACKERS = ("report_to", "wandb_project", "use_wandb")
_OUR_TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")
_KERNELS = re.compile("cut_cross_entropy|liger")
_HANDLED = DATASET_NAMES | SHARDING_NAMES | {*_MICRO, *_ACCUMULATION, *_TRACKERS}


@dataclass
class Migration:
    """The result.

    Attributes:
        settings: our keys and values.
        lost: a line for each of their settings without a counterpart.
        unneeded: names of their settings that a run does not need.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    unneeded: list[str] = field(default_factory=list)

    def words(self, name: str) -> str:
        """Return the words of a command that takes the config `name`; a list of datasets needs a model."""
        return f"config={name}" + ("" if "model.name" in self.settings else " model=qwen2.5-7b-instruct")

    def tree(self) -> dict[str, Any]:
        """Return the settings as sections."""
        tree: dict[str, Any] = {}
        for key in sorted(self.settings, key=_place):
            *parents, last = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = self.settings[key]
        return tree


def migrate(config: PeerConfig) -> Migration:
    """Translate a config, or a list of datasets; the result is valid. Settings of a list name no base model.

    Raises:
        InputError: the config names no base model, or an objective that a run does not have.
    """
    if is_registry(config.settings):
        return _of_registry(config)
    for name in OBJECTIVES:
        if (objective := config.settings.get(name)) and str(objective) not in KNOWN_OBJECTIVES:
            text = "runs learn from examples, preferences or a teacher"
            raise InputError(f"{config.file}: {name}: {text}, found {objective}")
    migration = Migration(dict(DEFAULTS[config.peer]))
    # What is special comes last: pref_loss is the loss of LLaMA-Factory's stage dpo.
    for name, value in sorted(config.settings.items(), key=lambda item: item[0] == "pref_loss"):
        if name not in _HANDLED and value not in (None, "", [], {}):
            _translate(name, value, OF_ONE_FRAMEWORK.get(config.peer, {}).get(name) or RULES.get(name), migration)
    _finish(config, migration)
    _drop_invalid(migration)
    return migration


def _of_registry(config: PeerConfig) -> Migration:
    migration = Migration()
    migration.settings["data.train"] = read_registry(config, migration.lost)
    if not migration.settings["data.train"]:
        raise InputError("\n".join([f"{config.file}: has no dataset that a run can read", *migration.lost]))
    return migration


def _translate(name: str, value: Any, rule: Rule | None, migration: Migration) -> None:
    key, found, note = "", None, REFUSED.get(name, "no counterpart")
    if isinstance(value, str) and "$" in value:
        migration.lost.append(f"{name}: {value} is a value of the shell")
        return
    if rule:
        key, note = rule.key, rule.note
        if rule.convert:
            found = rule.convert(value)
        elif isinstance(value, str | int | float) and value in (rule.values or {}):
            found, note = (rule.values or {})[value], ""
    elif name in UNNEEDED or (name == "plugins" and all(map(_KERNELS.search, map(str, listed(value))))):
        migration.unneeded.append(name)
        return
    elif same := same_meaning(name):
        key, found = same[0], same[1] or value
        if same[1] and value in (False, 0):
            return
    elif value is False:
        return
    if key and found is not None:
        if problem := _misfit(key, found):
            migration.settings.pop(key, None)  # the framework's default is not what the config names
            migration.lost.append(f"{key}: {shown(value)}: {problem}")
        elif migration.settings.get(key) != "int8" or key != "quant.type":
            migration.settings[key] = found
    elif note and value not in (False, 0, "none", "no", "0", -1):
        migration.lost.append(f"{name}: {shown(value)}: {note}")


@cache
def _type_of(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(find(key), config=ConfigDict(strict=True, allow_inf_nan=False))


def _misfit(key: str, value: Any) -> str:
    """Return why a value is none of our key's type, or nothing."""
    try:
        _type_of(key).validate_python(value)
    except ValidationError as error:
        return error.errors()[0]["msg"]
    return ""


def _count(settings: Mapping[str, Any], names: Sequence[str], migration: Migration) -> int | None:
    """Return the first of these settings that is given and is a whole number from 1 on."""
    for name in names:
        if (value := settings.get(name)) not in (None, "", 0, False):
            if str(value).isdecimal() and 0 < (count := int(str(value))) < 2**31:
                return count
            migration.lost.append(f"{name}: {shown(value)}: no whole number; set train.batch_size")
    return None


def _finish(config: PeerConfig, migration: Migration) -> None:
    """Set what depends on several settings."""
    theirs, ours = config.settings, migration.settings
    if "preference.objective" in ours and (length := ours.get("data.max_length")):
        ours["data.max_length"] = 2 * length  # of both sides together
    if not ours.get("model.name"):
        raise InputError(f"{config.file}: names no base model\nhelp: add model_name_or_path: HUB_ID_OR_FOLDER")
    ours.setdefault("quant.type", "none")
    ours |= read_sharding(theirs, config.file.parent, migration.lost)
    if ours["quant.type"] == "int8" and ours.pop("parallel.shard", "none") != "none":
        ours.pop("parallel.offload", None)
        migration.lost.append("parallel.shard: 8-bit layers cannot be sharded, layers of quant.type=nf4 can")
    if ours.get("model.dtype") in ("float16", "fp16"):  # A card without bfloat16.
        ours.setdefault("quant.compute_dtype", "float16")
    if "lora.alpha" not in ours:
        ours["lora.alpha"] = 2.0 * ours.get("lora.rank", 8)
    if "train.max_steps" in ours:
        ours.pop("train.epochs", None)
    if "train.warmup_steps" in ours:
        ours.pop("train.warmup_ratio", None)
    micro = _count(theirs, _MICRO, migration) or MICRO_BATCH[config.peer]
    # ms-swift fills a step up to 16 sequences.
    unnamed = max(16 // (micro * config.processes), 1) if config.peer == "ms-swift" else 1
    accumulation = _count(theirs, _ACCUMULATION, migration)
    if accumulation is None:
        accumulation = 1 if any(theirs.get(name) for name in _ACCUMULATION) else unnamed
    ours["train.micro_batch_size"] = micro
    ours["train.batch_size"] = micro * accumulation * config.processes
    trackers = theirs.get("report_to") or ""
    trackers = {str(name) for name in (trackers if isinstance(trackers, list) else [trackers])} - {"", "none"}
    if theirs.get("wandb_project"):
        ours |= {"track.wandb": True, "track.project": str(theirs["wandb_project"])}
    for tracker in sorted(trackers):
        if tracker in _OUR_TRACKERS:
            ours[f"track.{tracker}"] = True
        else:
            migration.lost.append(f"report_to: {tracker}: {', '.join(_OUR_TRACKERS)} are there")
    train, held_out = read_sources(config, migration.lost)
    if limit := _count(theirs, ("max_samples",), migration):
        train = [{**source, "limit": limit} for source in train]
    if not train:
        raise InputError(
            f"{config.file}: names no dataset\nhelp: add one there, or write data.train in a config of your own"
        )
    ours["data.train"] = train
    if held_out:
        ours["data.eval"] = held_out
    if not held_out and not ours.get("data.held_out"):
        for key in ("train.eval_every", "train.early_stopping"):
            ours.pop(key, None)


def _drop_invalid(migration: Migration) -> None:
    """Take settings out that the schema or a rule refuses, each with a line that says why."""
    for _ in range(10):
        try:
            RunConfig.model_validate(migration.tree())
            return
        except ValidationError as error:
            problems = problems_of(migration.tree(), error)
        for problem in problems:
            key = next((key for key in migration.settings if f"{problem.key}.".startswith(f"{key}.")), None)
            if key is None or key in ("model.name", "data.train"):
                raise InputError(f"cannot migrate: {problem.key}: {problem.text}")
            value = migration.settings.pop(key)
            migration.lost.append(f"{key}: {shown(value)}: {problem.text}")
    raise InputError("cannot migrate: the settings contradict each other: " + "; ".join(p.text for p in problems))


def as_yaml(migration: Migration, config: PeerConfig, name: str) -> str:
    """Return the config file with a comment that lists what was lost."""
    origin = f"# Written from {config.file.name}, a config of {config.peer}."
    lines = [f"# finetune train {migration.words(name)}", "#", origin]
    lost = [f"#   {' '.join(line.split())}" for line in migration.lost]
    lines += ["# Not carried over:", *lost] if lost else ["# Every setting has a counterpart."]
    if migration.unneeded:
        lines.append(f"# Not needed: {', '.join(sorted(migration.unneeded))}.")
    body = yaml.safe_dump(escaped(_plain(migration.tree())), sort_keys=False, allow_unicode=True, width=110)
    return "\n".join(lines) + "\n" + body


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _place(key: str) -> tuple[int, int]:
    section, _, name = key.partition(".")
    sections = list(RunConfig.model_fields)
    annotation = RunConfig.model_fields[section].annotation
    names = list(getattr(annotation, "model_fields", {}))
    return sections.index(section), names.index(name) if name in names else 0
