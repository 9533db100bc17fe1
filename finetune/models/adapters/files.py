"""Adapters on disk: PEFT folders, written offline and read back for verification; what their config says."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.models.adapters.folder import (
    CONFIG_FILE,
    TENSOR_FILE,
    check_adapter_folder,
    find_adapter,
    read_adapter_config,
)
from finetune.models.adapters.inits import ADAPTER, initial_factors
from finetune.models.adapters.names import PREFIX, as_peft_names
from finetune.models.module_matching import matches_key
from finetune.models.safetensors_header import read_header
from finetune.models.safetensors_index import load_tensors, save_tensors
from finetune.models.tokens import embedding_rows
from finetune.system.errors import ConfigError, FinetuneError, IntegrityError
from finetune.system.manifest import check_files

_MASTER = ".parametrizations.weight.original"  # name of a parametrized weight in torch
_MASTER_BIAS = ".parametrizations.bias.original"
# Settings of PEFT with another update. This package writes none of them.
_OTHER_UPDATES = (
    "alora_invocation_tokens arrow_config fan_in_fan_out kasa_config layer_replication lora_bias megatron_config "
    "monteclora_config target_parameters use_bdlora use_qalora velora_config"
).split()
# Inits that do not change the base. After other inits the base holds the residual; this package saves such an adapter
# as the difference to its start, with init True.
_KEEPS_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal")


def save_adapter(
    model: PeftModel,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    base_name: str | None = None,
    revision: str | None = None,
) -> None:
    """Write an adapter into an existing folder in PEFT's format, without network access or a model card.

    An adapter that started as a part of the base (PiSSA, OLoRA) is saved as the difference to its start, with twice the
    rank, so that it applies to the original base.

    Args:
        model: the trained model.
        folder: an existing folder.
        tokenizer: saved too, with its chat template and new tokens.
        base_name, revision: replace those of the base from `load_base`.
    """
    folder = Path(folder)
    save_tensors(file_tensors(model), folder / TENSOR_FILE, metadata={"format": "pt"})
    config = _file_config(model)
    config["base_model_name_or_path"] = base_name or config["base_model_name_or_path"]
    config["revision"] = revision or config["revision"]
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def file_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return the tensors of adapter_model.safetensors, on the CPU."""
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name, start in initial_factors(model).items():
        # scaling * (B A - B0 A0) = scaling * [B, -B0] [A; A0]
        is_A = name.endswith(f"lora_A.{ADAPTER}.weight")
        parameters[name] = torch.cat([parameters[name], start if is_A else -start], dim=0 if is_A else 1)
    named = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    return {_plain(name): tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named.items()}


def _plain(name: str) -> str:
    return name.replace(_MASTER, ".weight").replace(_MASTER_BIAS, ".bias")


def _file_config(model: PeftModel) -> dict[str, Any]:
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.inference_mode = True
    content = config.to_dict()
    if initial_factors(model):
        alpha_factor = 2**0.5 if content["use_rslora"] else 2  # keeps the scaling at twice the rank
        content["r"] *= 2
        content["lora_alpha"] *= alpha_factor
        content["rank_pattern"] = {key: 2 * rank for key, rank in content["rank_pattern"].items()}
        content["alpha_pattern"] = {key: alpha_factor * alpha for key, alpha in content["alpha_pattern"].items()}
    # A set's order changes from process to process.
    return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}


def check_adapter(folder: Path | str, model: PeftModel | None = None, *, trained: bool = True) -> None:
    """Read a saved adapter back and check that it is complete.

    Args:
        folder: of the adapter.
        model: the model it was saved from; every tensor must be bit-identical.
        trained: some `lora_B` must differ from zero, its value before the first step (default and gaussian inits).

    Raises:
        IntegrityError: names the tensors that are missing, not finite, zero or different.
    """
    folder = Path(folder)
    tensors = read_tensors(folder)
    problems = list(_incomplete(tensors))
    if trained and all(not tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
        problems.append("every lora_B is zero: nothing was trained")
    if model is not None:
        expected = file_tensors(model)
        problems += [f"{name} is missing" for name in expected.keys() - tensors.keys()]
        problems += [f"{name} is superfluous" for name in tensors.keys() - expected.keys()]
        problems += [
            f"{name} differs from the saved value"
            for name in expected.keys() & tensors.keys()
            if not torch.equal(expected[name], tensors[name])
        ]
    if problems:
        raise IntegrityError(f"{folder}: {TENSOR_FILE} is corrupt: {'; '.join(sorted(problems)[:10])}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of an adapter, under PEFT's names whatever program wrote them.

    Raises: ConfigError if there is none, IntegrityError if corrupt, not finite, or not what the manifest of its run
    lists.
    """
    check_adapter_folder(folder, "adapter")
    check_files(folder, [TENSOR_FILE])
    file = folder / TENSOR_FILE
    tensors = as_peft_names(load_tensors(file), str(file))
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise IntegrityError(f"{file}: NaN or infinity in {len(bad)} tensors: {', '.join(bad[:5])}")
    return tensors


def _incomplete(tensors: dict[str, Tensor]) -> Iterator[str]:
    """Yield factors without their partner, or with another rank."""
    factors = [name for name in tensors if ".lora_A." in name or ".lora_B." in name]
    if not factors:
        yield "no lora_A and lora_B"
    if wrong := [name for name in factors if tensors[name].dim() != 2]:
        yield f"{', '.join(wrong[:5])}: a factor is a matrix, found {list(tensors[wrong[0]].shape)}"
        return
    for name in factors:
        is_A = ".lora_A." in name
        partner = name.replace(".lora_A.", ".lora_B.") if is_A else name.replace(".lora_B.", ".lora_A.")
        if partner not in tensors:
            yield f"{partner} is missing"
        elif is_A and tensors[name].shape[0] != tensors[partner].shape[1]:
            yield f"{name} has rank {tensors[name].shape[0]}, its lora_B has {tensors[partner].shape[1]}"


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk that a new run starts from."""

    name: str  # as the user wrote it
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def check_same_kind(self, **here: Any) -> None:
        """Raise ConfigError with both values of every property that differs from the configured adapter.

        here: base, ranks by full name of the adapted module, alpha, alpha_pattern, rslora, dora, and new_tokens: token
        ids by name of the embedding module.
        """
        there = {
            "base": str(self.config.get("base_model_name_or_path")),
            "ranks": {
                name.removeprefix(PREFIX).partition(".lora_A.")[0]: len(tensor)
                for name, tensor in self.tensors.items()
                if ".lora_A." in name
            },
            "alpha": self.config.get("lora_alpha", 8),
            "alpha_pattern": self.config.get("alpha_pattern") or {},
            "rslora": bool(self.config.get("use_rslora")),
            "dora": bool(self.config.get("use_dora")),
            "new_tokens": token_ids(self.config),
        }
        differing = [key for key in here if here[key] != there[key]]
        # A hub id and a local copy of it differ in all but the last part.
        if "base" in differing and Path(there["base"]).name.lower() == Path(here["base"]).name.lower():
            differing.remove("base")
        if differing:
            shown = [f"{key}: found {_show(there[key])}, the config has {_show(here[key])}" for key in differing]
            raise ConfigError(f"lora.init_adapter={self.name}: another kind of adapter; {'; '.join(shown)}")


def token_ids(config: dict[str, Any]) -> dict[str, list[int]]:
    """An adapter's new tokens by module; PEFT also takes a list, which means the embedding."""
    ids = config.get("trainable_token_indices") or {}
    return {"embed_tokens": ids} if isinstance(ids, list) else ids


def _show(value: Any) -> str:
    if isinstance(value, dict) and any("." in key for key in value):
        names = sorted({name.rpartition(".")[2] for name in value})
        ranks = "/".join(map(str, sorted(set(value.values()))))
        return f"rank {ranks} on {', '.join(names)} ({len(value)} modules)"
    return str(value)


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return PEFT's factor of B A for a module: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((alpha for key, alpha in patterns.items() if matches_key(key, module)), config.get("lora_alpha", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def other_updates(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings of an adapter whose update is not scaling * B A."""
    return (f"{key}={config[key]}: the update is not scaling * B A" for key in _OTHER_UPDATES if config.get(key))


def other_base(config: Mapping[str, Any]) -> str | None:
    """Return the init after which an adapter needs other weights than its base, else None."""
    init = str(config.get("init_lora_weights")).lower()
    return None if init in _KEEPS_BASE else init


def fetch_adapter(name: str, key: str = "lora.init_adapter") -> SavedAdapter:
    """Read an adapter from a local folder or the hub. key: the config key of `name`, for messages.

    Raises:
        ConfigError: there is no adapter.
        IntegrityError: it is corrupt, not finite or incomplete.
    """
    folder = find_adapter(name, key)
    config = read_adapter_config(folder, f"{key}={name}")
    tensors = read_tensors(folder)
    if problems := list(_incomplete(tensors)):
        raise IntegrityError(f"{key}={name}: {TENSOR_FILE} is corrupt: {'; '.join(problems[:10])}")
    return SavedAdapter(name, folder, config, tensors)


def load_weights(model: PeftModel, adapter: SavedAdapter) -> None:
    """Load the weights of a saved adapter into an attached one of the same kind.

    Raises:
        IntegrityError: names tensors that are missing, superfluous or of another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    shapes = {_plain(name): tensor.shape for name, tensor in own.items()}
    found = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise IntegrityError(f"lora.init_adapter={adapter.name}: does not match the base at {', '.join(wrong[:5])}")
    set_peft_model_state_dict(model, {name: adapter.tensors[_plain(name)] for name in own})


@contextmanager
def refusals_of_peft(where: str) -> Iterator[None]:
    """Turn what PEFT raises for an adapter's settings and tensors into ConfigError, prefixed with `where`."""
    try:
        yield
    except (FinetuneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # PEFT checks little, so that errors of every kind come from deep inside.
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise ConfigError(f"{where}: PEFT cannot load the adapter: {reason}") from error


def load_adapter(model: PreTrainedModel, folder: Path | str) -> PeftModel:
    """Load a frozen adapter onto its base in eval mode, like `PeftModel.from_pretrained`.

    PEFT would ignore tensors with another program's names. The embedding grows if it has no spare rows for the
    adapter's new tokens.

    Raises:
        ConfigError: there is no adapter, or PEFT refuses its settings or its tensors.
        IntegrityError: it is corrupt.
    """
    folder = Path(folder)
    check_adapter(folder, trained=False)
    config = read_adapter_config(folder, f"adapter={folder}")
    ids = [id for rows in token_ids(config).values() for id in rows]
    if ids and max(ids) >= embedding_rows(model):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with warnings.catch_warnings(), refusals_of_peft(f"adapter={folder}"):
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        tensors = read_tensors(folder)
        if tensors.keys() == read_header(folder / TENSOR_FILE)[1].keys():
            return PeftModel.from_pretrained(model, str(folder)).eval()
        settings = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True
        loaded = PeftModel(model, settings)  # type: ignore[arg-type]
        set_peft_model_state_dict(loaded, tensors)
        return loaded.eval()
