"""Find adapters, the base that they were trained on, and the settings of their run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.config.command_options import Base
from finetune.config.compose import saved_config
from finetune.config.schema import ModelConfig, QuantConfig, RunConfig
from finetune.models.adapters.base_config import recorded_fingerprint
from finetune.models.adapters.files import SavedAdapter, fetch_adapter
from finetune.models.digest import base_fingerprint
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch, read_config, weight_files
from finetune.models.quant.quantize import head_name, storage_in
from finetune.models.safetensors_index import WeightFiles
from finetune.models.skeleton import build_skeleton
from finetune.system.console import Log
from finetune.system.errors import ConfigError


@dataclass(frozen=True)
class Trained:
    """Adapters on one base. cfg: config of the first adapter's run; None if another program trained it.

    model, quant: how training loaded the base; defaults without a run. folder, weights: of the base.
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
    """Load adapters and find their base.

    Args:
        names: run folders, checkpoints, adapter folders or hub ids.
        base: replaces the base in the adapters' config.
        log: called with a warning if `base` has other weights than training used.

    Raises:
        ConfigError: the adapters have different bases, or the base is quantized or has other weights than training
            used.
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
        raise ConfigError(
            f"adapter: the adapters have different bases: {listed}\nhelp: pass model=NAME if they are the same"
        )
    if cfg is not None:
        return cfg.model
    name, revision = named[adapters[0].name], adapters[0].config.get("revision")
    if not name:
        raise ConfigError(f"adapter={adapters[0].name}: adapter_config.json names no base model\nhelp: pass model=NAME")
    return ModelConfig(name=name, revision=revision if revision and not Path(name).is_dir() else None)


def _check_base(adapter: SavedAdapter, folder: Path, name: str, chosen: bool, log: Log) -> None:
    """Compare the base with the fingerprint in the run's run.json, if there is one."""
    then = recorded_fingerprint(adapter.folder)
    if then is None or then == base_fingerprint(str(folder)):
        return
    found = f"{name}: has other weights than those that adapter={adapter.name} was trained on"
    if not chosen:
        raise ConfigError(f"{found}\nhelp: restore them, or name the base with model=")
    log(f"WARNING: model={found}; kl_check shows the effect")


def kept_in_training(trained: Trained) -> dict[str, list[str]]:
    """Return the blocks' linear layers that training stored otherwise than in `quant.type`, by storage."""
    if trained.quant.type == "none" or not (trained.quant.skip_modules or trained.quant.int8):
        return {}
    skeleton = build_skeleton(trained.folder, torch.bfloat16, "eager")
    kept: dict[str, list[str]] = {}
    for name, kind in storage_in(skeleton, trained.quant).items():
        if kind != trained.quant.type and name != head_name(skeleton):
            kept.setdefault(kind, []).append(name)
    return kept


def compensates_quantization(cfg: RunConfig | None) -> bool:
    """Return whether the adapter of a run learned to compensate 4-bit quantization, so it needs a quantized base."""
    if cfg is None or cfg.quant.type != "nf4":
        return False
    return cfg.distill.objective == "recover" or cfg.lora.init == "loftq"


def choose_base(trained: Trained, wanted: Base) -> tuple[str, str]:
    """Return `original` or `dequantized`, and the reason. Raises: ConfigError if `wanted` needs a 4-bit base."""
    four_bit = trained.quant.type == "nf4"
    if wanted == "dequantized" and not four_bit:
        raise ConfigError(
            f"base=dequantized: needs an adapter trained on a 4-bit base, found quant.type={trained.quant.type}"
        )
    init = str(trained.adapters[0].config.get("init_lora_weights")).lower()
    compensates = four_bit and (compensates_quantization(trained.cfg) or init == "loftq")
    if wanted == "auto":
        if compensates:
            return "dequantized", "the adapter compensates the error of quantization"
        return "original", "the adapter learned a task"
    if wanted == "original" and compensates:
        return wanted, "chosen, although the adapter compensates an error that these weights do not have"
    return wanted, "chosen"
