"""Which modules `lora.*` means in a model; all that is wrong with it is said at once, before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from finetune.config.schema import LoraConfig
from finetune.models.families import family_of
from finetune.models.module_matching import close_names, ends_with, matches_key
from finetune.models.quant.quantize import head_name, linear_names, stored_as
from finetune.system.errors import ConfigError

ALL_LINEAR = "all-linear"
CHANGES_BASE = ("pissa", "pissa_niter_16", "olora")  # the adapter starts with a part of the base's weight
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Targets:
    """What `lora.target_modules` and its companions mean in one model."""

    spec: list[str] | str  # as PEFT's config holds it: names or one regex
    ranks: dict[str, int]  # rank of the adapter on each targeted module, by full name
    modules_to_save: list[str]  # full names


def plan_targets(model: PreTrainedModel, cfg: LoraConfig) -> Targets:
    """Resolves the config's names against the model, without touching it.

    Raises: ConfigError with every problem: names that match nothing (and the nearest that exist), layers that the
    model lacks, targets that are no linear layer, an init that the base or the rank does not allow.
    """
    family = family_of(model.config.model_type, "the model")
    spec: list[str] | str = cfg.target_modules
    if spec == ALL_LINEAR:
        spec = list(family.linear_modules)
    names = list(_targeted(model, spec, cfg.layers_to_transform))
    targets = Targets(spec, {name: _rank(cfg, name) for name in names}, _expand(model, cfg.modules_to_save))
    problems = [
        *_unmatched(model, spec),
        *_layers(model, cfg),
        *_not_linear(model, names),
        *_patterns(cfg, names),
        *_saved(model, cfg, targets),
        *_init(model, cfg, targets),
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return targets


def _targeted(model: nn.Module, spec: list[str] | str, layers: list[int] | None) -> Iterator[str]:
    for name, _ in model.named_modules():
        if not _matches_spec(spec, name):
            continue
        number = _LAYER_NUMBER.search(name)
        if layers is None or (number and int(number[1]) in layers):
            yield name


def _matches_spec(spec: list[str] | str, name: str) -> bool:
    if isinstance(spec, list):
        return any(ends_with(name, wanted) for wanted in spec)
    try:
        return re.fullmatch(spec, name) is not None
    except re.error:
        return False


def _rank(cfg: LoraConfig, name: str) -> int:
    return next((rank for key, rank in cfg.rank_pattern.items() if _valid(key) and matches_key(key, name)), cfg.rank)


def _valid(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _expand(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """Full names; PEFT matches any suffix, so that `norm` would mean every input_layernorm as well."""
    names = [name for name, _ in model.named_modules() if name]
    return [name for name in names if any(ends_with(name, suffix) for suffix in wanted)]


def _unmatched(model: nn.Module, spec: list[str] | str) -> Iterator[str]:
    patterns: list[list[str] | str] = [[name] for name in spec] if isinstance(spec, list) else [spec]
    for pattern in patterns:
        shown = pattern[0] if isinstance(pattern, list) else pattern
        if isinstance(pattern, str) and not _valid(pattern):
            yield f"lora.target_modules: {shown!r} is no valid regex; give a list of names or {ALL_LINEAR}"
        elif not any(True for _ in _targeted(model, pattern, None)):
            yield f"lora.target_modules: {shown!r} matches no module; {close_names(shown, linear_names(model))}"


def _layers(model: PreTrainedModel, cfg: LoraConfig) -> Iterator[str]:
    count = model.config.num_hidden_layers
    if absent := [number for number in cfg.layers_to_transform or [] if number >= count]:
        yield f"lora.layers_to_transform: {absent} are beyond the model's {count} layers (0 to {count - 1})"
    if cfg.layers_to_transform == []:
        yield "lora.layers_to_transform is empty; null means all layers"
    if cfg.layers_to_transform is not None and isinstance(cfg.target_modules, str) and cfg.target_modules != ALL_LINEAR:
        yield "lora.layers_to_transform goes with a list of names or all-linear; let the regex name the layers instead"


def _not_linear(model: PreTrainedModel, names: list[str]) -> Iterator[str]:
    linear, head = linear_names(model), head_name(model)
    for name in names:
        if name == head or name not in linear:
            what = "the output layer" if name == head else f"a {type(model.get_submodule(name)).__name__}"
            yield (
                f"lora.target_modules matches {name}, which is {what}: adapters go on the blocks' linear layers; "
                "lora.modules_to_save trains other modules in full"
            )


def _patterns(cfg: LoraConfig, names: list[str]) -> Iterator[str]:
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in getattr(cfg, setting):
            if not _valid(key):
                yield f"lora.{setting}: {key!r} is no valid regex"
            elif not any(matches_key(key, name) for name in names):
                yield f"lora.{setting}: {key!r} matches no targeted module; {close_names(key, names)}"


def _saved(model: PreTrainedModel, cfg: LoraConfig, targets: Targets) -> Iterator[str]:
    every = [name for name, _ in model.named_modules() if name]
    for wanted in cfg.modules_to_save:
        if not any(ends_with(name, wanted) for name in every):
            yield f"lora.modules_to_save: {wanted!r} matches no module; {close_names(wanted, every)}"
    for name in targets.modules_to_save:
        parts = {f"{name}.{part}".rstrip("."): module for part, module in model.get_submodule(name).named_modules()}
        if quantized := [part for part, module in parts.items() if stored_as(module) != "none"]:
            yield (
                f"lora.modules_to_save: {quantized[0]} is quantized and cannot be trained; add it to quant.skip_modules"
            )
        if adapted := sorted(set(parts) & set(targets.ranks)):
            yield f"lora.modules_to_save and lora.target_modules both name {adapted[0]}"
        vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
        if cfg.new_tokens and model.get_submodule(name) in vocabulary:
            yield f"lora.new_tokens trains rows of {name}, which lora.modules_to_save trains in full; drop one"


def _init(model: PreTrainedModel, cfg: LoraConfig, targets: Targets) -> Iterator[str]:
    stored = {stored_as(model.get_submodule(name)) for name in targets.ranks}
    if cfg.init in CHANGES_BASE and stored - {"none"}:
        yield f"lora.init={cfg.init} changes the base's weights, which no quantized base allows: set quant.type=none"
    if cfg.init == "loftq" and "nf4" not in stored:
        yield "lora.init=loftq makes up for the error of a 4-bit base: set quant.type=nf4 or lora.init=default"
    if cfg.init == "orthogonal" and (odd := sorted({rank for rank in targets.ranks.values() if rank % 2})):
        yield f"lora.init=orthogonal needs even ranks, got {odd}"
    if cfg.init in (*CHANGES_BASE, "loftq"):
        for name, rank in targets.ranks.items():
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear) and rank > (most := min(layer.in_features, layer.out_features)):
                yield f"lora.init={cfg.init}: rank {rank} is above {most}, the most that {name} has"
    if cfg.dora and "int8" in stored and model.device.type == "cpu":
        # PEFT 0.21 copies the weight in each pass and loses its scales: the second pass dies on a missing tensor.
        yield "lora.dora does not work on int8 layers on the CPU; set quant.type=nf4, and quant.int8=[] if it is given"
    if cfg.init_adapter is not None and cfg.init != "default":
        yield f"lora.init_adapter gives the adapter its weights, so lora.init={cfg.init} cannot: drop one"
