"""Resolve the module names of `lora.*` in a loaded model; report every problem before anything changes.

config/schema.py has already checked what the config alone shows: regexes, even ranks, the base that an init needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from finetune.config.schema import LoraConfig
from finetune.models.decoder import family_in, text_config
from finetune.models.embedding import HostEmbedding
from finetune.models.families import ModelFamily
from finetune.models.module_matching import absent_modules, close_names, ends_with, matches_key, targeted
from finetune.models.quant.quantize import head_name, linear_names, stored_as
from finetune.system.errors import ConfigError

ALL_LINEAR = "all-linear"
CHANGES_BASE = ("pissa", "pissa_niter_16", "olora")  # these inits move a part of the base's weight into the adapter
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Targets:
    """The modules that a LoraConfig names in one model."""

    spec: list[str] | str  # for PEFT: names or one regex
    layers: list[int] | None  # for PEFT: decoder layers with an adapter, if `spec` does not name them
    ranks: dict[str, int]  # rank of the adapter of each target, by full name
    modules_to_save: list[str]  # full names


def plan_targets(model: PreTrainedModel, cfg: LoraConfig) -> Targets:
    """Resolve the names of the config without changing the model.

    Raises:
        ConfigError: lists every problem, among them names that match no module, layers that the model does not have,
            targets that are not linear layers, and a rank that is too large for an init.
    """
    family = family_in(model)
    spec: list[str] | str = cfg.target_modules
    if spec == ALL_LINEAR:
        spec = list(family.linear_modules)
    towers = tuple(f"{tower.module}." for tower in family.towers.values())
    every = [name for name, _ in model.named_modules() if name and not f"{name}.".startswith(towers)]
    matched = targeted(spec, every)
    names = [name for name in every if any(name in found for found in matched.values())]
    if (layers := cfg.layers_to_transform) is not None:
        names = [name for name in names if (number := _LAYER_NUMBER.search(name)) and int(number[1]) in layers]
    in_towers = []
    if towers:
        spec, layers, decoder = _full_names(family, spec, cfg), None, names
        names = [name for name, _ in model.named_modules() if re.fullmatch(spec, name)]
        in_towers = [name for name in names if name not in decoder]
    patterns = cfg.rank_pattern.items()
    ranks = {name: next((rank for key, rank in patterns if matches_key(key, name)), cfg.rank) for name in names}
    # PEFT matches any suffix, so that `norm` would mean every input_layernorm as well.
    saved = [name for name in every if any(ends_with(name, suffix) for suffix in cfg.modules_to_save)]
    targets = Targets(spec, layers, ranks, saved)
    problems = list(absent_modules(cfg, every, linear_names(model), text_config(model).num_hidden_layers))
    problems += _not_linear(model, [name for name in names if name not in in_towers])
    problems += [
        f"lora.towers: {family.title} has no {name} tower; it has {' and '.join(family.towers) or 'none'}"
        for name in cfg.towers
        if name not in family.towers
    ]
    problems += _patterns(cfg, names)
    problems += _saved(model, cfg, targets)
    problems += _init(model, cfg, targets)
    if problems:
        raise ConfigError("\n".join(problems))
    return targets


def _full_names(family: ModelFamily, spec: list[str] | str, cfg: LoraConfig) -> str:
    """Return a regex of full names: a short name would match the layers of a tower as well."""
    numbers = r"\d+" if cfg.layers_to_transform is None else f"(?:{'|'.join(map(str, cfg.layers_to_transform))})"
    pattern = spec if isinstance(spec, str) else rf".*\.(?:{'|'.join(map(re.escape, spec))})"
    parts = [rf"(?={re.escape(family.decoder)}\.layers\.{numbers}\.)(?:{pattern})"]
    for tower in (tower for name, tower in family.towers.items() if name in cfg.towers):
        parts.append(rf"{re.escape(tower.blocks)}\.\d+\.(?:.*\.)?(?:{'|'.join(map(re.escape, tower.linears))})")
    return "|".join(parts)


def _not_linear(model: PreTrainedModel, names: list[str]) -> Iterator[str]:
    linear, head = linear_names(model), head_name(model)
    for name in names:
        if name == head or name not in linear:
            kind = "the output layer" if name == head else type(model.get_submodule(name)).__name__
            yield (
                f"lora.target_modules: adapters need linear layers of the decoder, found {name} ({kind}); "
                "lora.modules_to_save trains other modules in full"
            )


def _patterns(cfg: LoraConfig, names: list[str]) -> Iterator[str]:
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in getattr(cfg, setting):
            if not any(matches_key(key, name) for name in names):
                yield f"lora.{setting}: {key!r} matches no targeted module; {close_names(key, names)}"


def _saved(model: PreTrainedModel, cfg: LoraConfig, targets: Targets) -> Iterator[str]:
    embedding = model.get_input_embeddings()
    saved = [model.get_submodule(name) for name in targets.modules_to_save]
    if isinstance(embedding, HostEmbedding) and (cfg.new_tokens or embedding in saved):
        key = "new_tokens" if cfg.new_tokens else "modules_to_save"
        yield f"lora.{key}: trains the embedding, which is in main memory; set model.embedding=device"
    for name in targets.modules_to_save:
        parts = {f"{name}.{part}".rstrip("."): module for part, module in model.get_submodule(name).named_modules()}
        if quantized := [part for part, module in parts.items() if stored_as(module) != "none"]:
            yield f"lora.modules_to_save: {quantized[0]} is quantized, so it cannot train; add it to quant.skip_modules"
        if adapted := sorted(set(parts) & set(targets.ranks)):
            yield f"lora.modules_to_save: {adapted[0]} is also in lora.target_modules; name it in one of them"
        vocabulary = (embedding, model.get_output_embeddings())
        if cfg.new_tokens and model.get_submodule(name) in vocabulary:
            yield f"lora.new_tokens: lora.modules_to_save already trains {name}; remove one of them"


def _init(model: PreTrainedModel, cfg: LoraConfig, targets: Targets) -> Iterator[str]:
    stored = {stored_as(model.get_submodule(name)) for name in targets.ranks}
    if cfg.init == "loftq" and "nf4" not in stored:
        yield "lora.init: loftq needs targets in nf4, found none; set lora.init=default or change quant.skip_modules"
    if cfg.init in (*CHANGES_BASE, "loftq"):
        for name, rank in targets.ranks.items():
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear) and rank > (most := min(layer.in_features, layer.out_features)):
                yield f"lora.init: {cfg.init} needs a rank of at most {most} on {name}, found {rank}"
    if cfg.dora and "int8" in stored and model.device.type == "cpu":
        # PEFT 0.21 copies the weight in each pass and loses its scales: the second pass dies on a missing tensor.
        yield "lora.dora: does not work on int8 layers on the CPU; set quant.type=nf4 and quant.int8=[]"
