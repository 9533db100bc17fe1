"""Choose an allocation from sensitivities, compare it with simpler ones, and write it as an option of `quant=`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from finetune import __version__
from finetune.config.command_options import AllocateOptions
from finetune.config.schema import ModelConfig, QuantConfig, RunConfig
from finetune.data.batch import Batch
from finetune.distill.fingerprint import teacher_weights
from finetune.distill.resident import load_resident
from finetune.evaluation.scoring import evaluating
from finetune.losses.cross_entropy import head_of
from finetune.losses.hidden_states import base_of, target_states
from finetune.mixed_precision.allocation import Choices, allocate
from finetune.mixed_precision.journal import MeanKl, Sensitivities
from finetune.mixed_precision.measure import batches_of, load_rows, sample, working_device
from finetune.mixed_precision.sensitivity import divergences, mean_kl
from finetune.models.fused import fuse_layers
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch, weight_files
from finetune.models.load import load_base
from finetune.models.quant.bit_widths import DTYPE_BYTES
from finetune.models.safetensors_index import WeightFiles
from finetune.system.atomic import write_text
from finetune.system.console import Log
from finetune.system.errors import ConfigError
from finetune.system.resources import packaged

_HEADER = "# Written by finetune allocate"
_ALLOCATED = "the allocation"


@dataclass(frozen=True)
class Allocation:
    """A chosen allocation; sizes are those of the whole base."""

    storage: dict[str, str]  # the kind of each linear layer
    quant: QuantConfig
    budget_bytes: float
    size_bytes: int
    predicted: float  # sum of the single KLs, in nats per target
    measured: dict[str, MeanKl]  # of whole allocations by description; empty with measure=false
    choice: str = _ALLOCATED  # the description of this one


def choose(cfg: RunConfig, options: AllocateOptions, log: Log) -> Allocation:
    """Choose the allocation with the least sum of single KLs within the budget.

    With `options.measure`, measure it and the simple allocations that fit as a whole, and choose the best of these.

    Raises:
        ConfigError: the folder holds no sensitivities of this model, or the budget is out of reach.
    """
    found = Sensitivities.read(Path(options.sensitivity).expanduser())
    _check_made_from(found, cfg, options.sensitivity)
    choices = Choices.of(found, rest_bytes(cfg.model, found.shapes), cfg.quant.double, cfg.model.dtype)
    budget_bytes = options.budget_gb * 1e9
    storages = {_ALLOCATED: allocate(choices, budget_bytes)}
    measured: dict[str, MeanKl] = {}
    if options.measure:
        training, held_out = load_rows(cfg, log)
        batches = batches_of(sample(held_out if len(held_out) else training, options.rows), cfg.data.max_length)
        storages |= choices.simple(budget_bytes)
        quants = {name: quant_of(storage, cfg.quant) for name, storage in storages.items()}
        measured = measure_quants(cfg.model, quants, batches, log)
    best = min(measured, key=lambda name: measured[name].kl, default=_ALLOCATED)
    storage = storages[best]
    return Allocation(
        storage=storage,
        quant=quant_of(storage, cfg.quant),
        budget_bytes=budget_bytes,
        size_bytes=choices.bytes_of(storage),
        predicted=choices.nats_of(storage),
        measured=measured,
        choice=best,
    )


def _check_made_from(found: Sensitivities, cfg: RunConfig, folder: str) -> None:
    problems = []
    if found.made_from.get("weights") != teacher_weights(cfg.model):
        problems.append(f"model.name: sensitivity={folder} was measured on other weights ({found.model})")
    for key, value in {
        "quant.double": cfg.quant.double,
        "quant.compute_dtype": cfg.quant.compute_dtype,
        "model.dtype": cfg.model.dtype,
    }.items():
        if (then := found.made_from.get(key.partition(".")[2])) != value:
            problems.append(f"{key}: sensitivity={folder} was measured with {then}, found {value}")
    if problems:
        raise ConfigError("\n".join([*problems, "help: measure again, or use the same config"]))


def rest_bytes(model: ModelConfig, linears: Mapping[str, object]) -> int:
    """Return the size of everything except the linear layers of the blocks, in the model's dtype."""
    folder = fetch(model.name, model.revision, TEXT_FILES + WEIGHT_FILES, "model.name").folder
    tensors = WeightFiles(weight_files(folder, model.name)).tensors
    rest = [stored.shape for name, stored in tensors.items() if name.removesuffix(".weight") not in linears]
    return DTYPE_BYTES[model.dtype] * sum(map(math.prod, rest))


def quant_of(storage: Mapping[str, str], like: QuantConfig) -> QuantConfig:
    """Return the settings that give this storage, with all others as in `like`."""
    kinds = set(storage.values())
    base = next((kind for kind in ("nf4", "int8") if kind in kinds), "none")
    named = {kind: [name for name, its in storage.items() if its == kind] for kind in ("none", "int8")}
    changes: dict[str, Any] = {
        "type": base,
        "skip_modules": named["none"] if base != "none" else [],
        "int8": named["int8"] if base == "nf4" else [],
        "keep_dequantized": like.keep_dequantized and base == "nf4",
    }
    return like.model_copy(update=changes)


@torch.no_grad()
def measure_quants(
    model: ModelConfig, quants: Mapping[str, QuantConfig], batches: Sequence[Batch], log: Log = lambda _: None
) -> dict[str, MeanKl]:
    """Measure KL(16 bit || quantized) of each of these settings, with the dtypes and kernels of a run."""
    device = working_device()
    reference = load_resident(model, None, device).model
    head, vocabulary = head_of(reference), int(base_of(reference).config.vocab_size)
    wanted = _final_states(reference, batches)
    measured = {}
    for name, quant in quants.items():
        # Used once, so not written to the cache on disk.
        plain = quant.model_copy(update={"cache": False, "keep_dequantized": False})
        base = load_base(model, plain, device)
        fuse_layers(base)
        found = _final_states(base, batches)
        nats = [divergences(a_ND, [b_ND], head, vocabulary)[0] for a_ND, b_ND in zip(wanted, found, strict=True)]
        measured[name] = mean_kl(nats, batches)
        log(f"allocation: storage={name}, kl={measured[name]} nats per target")
    return measured


def _final_states(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    with evaluating(model):
        return [target_states(model, batch).hidden_ND for batch in batches]


def write_allocation(allocation: Allocation, file: Path, command: str, model: str) -> None:
    """Write a file for configs/quant, with the command that made it.

    Raises:
        ConfigError: the file exists and is not an allocation, or cannot be written.
    """
    check_place(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, as_yaml(allocation, command, model))
    except OSError as error:
        raise ConfigError(f"out={file}: cannot be written ({error.strerror or error})") from error


def check_place(file: Path) -> None:
    """Raise ConfigError if the file exists and is not an allocation, or its name is not allowed."""
    if file.suffix != ".yaml":
        raise ConfigError(f"out={file}: not a .yaml file\nhelp: use a name such as configs/quant/allocated.yaml")
    if (packaged("configs") / "quant" / file.name).exists():
        raise ConfigError(f"out={file}: quant={file.stem} is a packaged option\nhelp: use another name")
    if file.is_dir() or (file.exists() and not file.read_text(encoding="utf-8", errors="replace").startswith(_HEADER)):
        raise ConfigError(f"out={file}: exists and is not an allocation\nhelp: remove it, or choose another file")


def as_yaml(allocation: Allocation, command: str, model: str) -> str:
    """Format the settings as YAML, with their origin and their KL as comments."""
    counts = {kind: list(allocation.storage.values()).count(kind) for kind in ("nf4", "int8", "none")}
    layers = ", ".join(f"{count} in {'16 bit' if kind == 'none' else kind}" for kind, count in counts.items() if count)
    header = [
        f"{_HEADER} {__version__}:",
        f"#   {command}",
        f"# Base: {model}, {allocation.size_bytes / 1e9:.6g} GB of {allocation.budget_bytes / 1e9:.6g}; "
        f"linear layers: {layers}; the head stays in 16 bit.",
        f"# KL to the 16-bit model in nats per target token: {allocation.predicted:.2e} by single layers",
    ]
    for name, mean in allocation.measured.items():
        chosen = " (this one)" if name == allocation.choice else ""
        header.append(f"#   {mean} measured on {mean.tokens:,} targets: {name}{chosen}")
    quant = allocation.quant
    content = {key: getattr(quant, key) for key in ("type", "double", "compute_dtype", "skip_modules", "int8")}
    return "\n".join(header) + "\n" + yaml.safe_dump(content, sort_keys=False)
