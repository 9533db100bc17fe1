"""What is to be merged: the adapters, the base they belong on, and what their run says about both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.config.command_options import Base
from finetune.config.compose import saved_config
from finetune.config.schema import ModelConfig, QuantConfig, RunConfig
from finetune.models.adapters.files import SavedAdapter, fetch_adapter
from finetune.models.digest import base_fingerprint
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch, read_config, weight_files
from finetune.models.quant.four_bit import build_skeleton
from finetune.models.quant.quantize import head_name, storage_in
from finetune.models.safetensors_index import WeightFiles
from finetune.system.console import Log
from finetune.system.errors import ConfigError


@dataclass(frozen=True)
class Trained:
    """Adapters on one base. cfg: of the first adapter's run, None for an adapter from elsewhere.

    folder: of the base's files. model, quant: how the base was loaded in training; without a run, the defaults.
    """

    adapters: list[SavedAdapter]
    cfg: RunConfig | None
    model: ModelConfig
    quant: QuantConfig
    folder: Path
    weights: WeightFiles

    @property
    def files(self) -> dict[str, Path]:
        return {name: stored.file for name, stored in self.weights.tensors.items()}


def find_trained(names: Sequence[str], base: str | None, log: Log) -> Trained:
    """The adapters that these names mean, read whole, and the base that they belong on.

    base: used in place of what the adapters name.
    Raises: ConfigError if the adapters are for different bases, the base is not the one they were trained on or is
    quantized; what fetching and reading raise.
    """
    adapters = [fetch_adapter(name, "adapter") for name in names]
    cfg = saved_config(adapters[0].folder)
    model = _model(adapters, cfg, base)
    folder = fetch(model.name, model.revision, TEXT_FILES + WEIGHT_FILES, "model").folder
    read_config(folder, model.name)
    for adapter in adapters:
        _check_base(adapter, folder, model.name, base is not None, log)
    quant = cfg.quant if cfg is not None else QuantConfig()
    return Trained(adapters, cfg, model, quant, folder, WeightFiles(weight_files(folder, model.name)))


def _model(adapters: Sequence[SavedAdapter], cfg: RunConfig | None, base: str | None) -> ModelConfig:
    if base is not None:
        own = cfg.model if cfg is not None else ModelConfig(name=base)
        return own.model_copy(update={"name": base, "revision": None, "tokenizer": None})
    named = {adapter.name: str(adapter.config.get("base_model_name_or_path") or "") for adapter in adapters}
    if len({Path(name).name.lower() for name in named.values()}) > 1:
        listed = ", ".join(f"{adapter} on {name or 'none'}" for adapter, name in named.items())
        raise ConfigError(f"adapter: the adapters name different bases ({listed}); give model=NAME if they are one")
    if cfg is not None:
        return cfg.model
    name, revision = named[adapters[0].name], adapters[0].config.get("revision")
    if not name:
        raise ConfigError(f"adapter={adapters[0].name}: its adapter_config.json names no base model; give model=NAME")
    return ModelConfig(name=name, revision=revision if revision and not Path(name).is_dir() else None)


def _check_base(adapter: SavedAdapter, folder: Path, name: str, chosen: bool, log: Log) -> None:
    """Whether the base is the one that the run's run.json describes, where there is one."""
    places = (adapter.folder, adapter.folder.parent)
    run = next((place / "run.json" for place in places if (place / "run.json").is_file()), None)
    if run is None:
        return
    try:
        then = json.loads(run.read_text(encoding="utf-8"))["base"]["fingerprint"]
    except (ValueError, LookupError, TypeError):
        return  # not ours
    if then is None or then == base_fingerprint(str(folder)):
        return
    found = f"{name} holds other weights than adapter={adapter.name} was trained on"
    if not chosen:
        raise ConfigError(f"{found}; restore them, or name the base to merge into with model=")
    log(f"WARNING: {found}; the comparison below says what that does")


def kept_in_training(trained: Trained) -> dict[str, list[str]]:
    """Full names of the blocks' linear layers that training kept in 16 bit (`none`) or 8 beside others; by storage."""
    if trained.quant.type == "none" or not (trained.quant.skip_modules or trained.quant.int8):
        return {}
    skeleton = build_skeleton(trained.folder, torch.bfloat16, "eager")
    head = head_name(skeleton)
    kept: dict[str, list[str]] = {}
    for name, kind in storage_in(skeleton, trained.quant).items():
        if kind != trained.quant.type and name != head:
            kept.setdefault(kind, []).append(name)
    return kept


def makes_up_for_quantizing(cfg: RunConfig | None) -> bool:
    """Whether a run's adapter learned to make up for what 4 bits took, and so belongs on such a base alone."""
    if cfg is None or cfg.quant.type != "nf4":
        return False
    return cfg.distill.objective == "recover" or cfg.lora.init == "loftq"


def choose_base(trained: Trained, wanted: Base) -> tuple[str, str]:
    """`original` or `dequantized`, and why.

    Raises: ConfigError for dequantized weights of a base that was not in 4 bit.
    """
    four_bit = trained.quant.type == "nf4"
    if wanted == "dequantized" and not four_bit:
        raise ConfigError(
            f"base=dequantized is for adapters trained on a 4-bit base; this one's was quant.type={trained.quant.type}"
        )
    makes_up = four_bit and (
        makes_up_for_quantizing(trained.cfg)
        or str(trained.adapters[0].config.get("init_lora_weights")).lower() == "loftq"
    )
    if wanted == "auto":
        if makes_up:
            return "dequantized", "the adapter learned to make up for what quantizing took"
        return "original", "the adapter learned a task"
    if wanted == "original" and makes_up:
        return wanted, "as asked, though the adapter makes up for a loss that these weights do not have"
    return wanted, "as asked"
