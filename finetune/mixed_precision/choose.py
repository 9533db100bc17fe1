"""Choose the storage of each layer from sensitivities, and write it as an option of `quant=`.

The loss of an allocation is the sum of the layers' KLs to the 16-bit model, each measured alone. In fp32 that sum is
within a fifth of the KL of all changes together (docs/mixed-precision.md), so it orders allocations well. This is a
multiple-choice knapsack; HiGHS solves it to optimality.
Source: Sinha and Zoltners 1979, Operations Research 27(3), the multiple-choice knapsack problem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from finetune import __version__
from finetune.config.command_options import AllocateOptions
from finetune.config.schema import ModelConfig, QuantConfig, RunConfig
from finetune.data.batch import Batch
from finetune.data.loader import load_media_processor
from finetune.data.media.processor import MediaProcessor
from finetune.distill.fingerprint import teacher_weights
from finetune.distill.resident import load_resident
from finetune.evaluation.scoring import evaluating
from finetune.losses.cross_entropy import head_of, vocabulary_rows
from finetune.losses.hidden_states import base_of, target_states
from finetune.mixed_precision.journal import MeanKl, Sensitivities, layer_of
from finetune.mixed_precision.measure import batches_of, divergences, load_rows, mean_kl, sample, working_device
from finetune.models.families import FAMILIES
from finetune.models.fused import fuse_layers
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch, read_config, weight_files
from finetune.models.load import load_base
from finetune.models.quant.bit_widths import DTYPE_BYTES, stored_bytes
from finetune.models.safetensors_index import WeightFiles
from finetune.system.atomic import write_text
from finetune.system.console import Log
from finetune.system.errors import ConfigError, FinetuneError, os_errors_as
from finetune.system.resources import packaged
from finetune.towers.towers import build_towers

_TIME_LIMIT_SECONDS = 60.0  # 588 variables take a second.


@dataclass(frozen=True)
class Choices:
    """The kinds of storage of each linear layer, with their sizes and KLs."""

    names: list[str]  # of the linear layers [M], in full
    kinds: list[str]  # of storage [K], in the terms of `quant.type`; the last is none (16 bit)
    size_bytes: np.ndarray  # [M, K]
    nats: np.ndarray  # KL to the 16-bit model of each change alone [M, K], 0 in 16 bit
    rest_bytes: int  # of everything except the linear layers of the blocks

    @staticmethod
    def of(found: Sensitivities, rest_bytes: int, double: bool, dtype: str) -> Choices:
        """Build the choices from measurements; `double` and `dtype` are `quant.double` and `model.dtype`."""
        kinds = [*found.kinds, "none"]
        sizes = [[stored_bytes(kind, shape, double, dtype) for kind in kinds] for shape in found.shapes.values()]
        nats = [[max(0.0, found.measured[name, kind].kl) for kind in found.kinds] + [0.0] for name in found.shapes]
        return Choices(list(found.shapes), kinds, np.array(sizes), np.array(nats), rest_bytes)

    @property
    def layers(self) -> int:
        return 1 + max(map(layer_of, self.names))

    def bytes_of(self, storage: Mapping[str, str]) -> int:
        """Return the size of the whole base, embedding and head included."""
        sizes = zip(self.names, self.size_bytes, strict=True)
        return self.rest_bytes + sum(int(row[self.kinds.index(storage[name])]) for name, row in sizes)

    def nats_of(self, storage: Mapping[str, str]) -> float:
        """Return the sum of the single KLs."""
        nats = zip(self.names, self.nats, strict=True)
        return sum(float(row[self.kinds.index(storage[name])]) for name, row in nats)

    def uniform(self, kind: str) -> dict[str, str]:
        """Store every layer as one kind."""
        return dict.fromkeys(self.names, kind)

    def outer(self, outer: str, inner: str, first: int, last: int) -> dict[str, str]:
        """Store the first and the last layers as one kind, those between as another: the usual rule of thumb."""
        edge = self.layers - last
        return {name: outer if layer_of(name) < first or layer_of(name) >= edge else inner for name in self.names}

    def simple(self, budget_bytes: float) -> dict[str, dict[str, str]]:
        """Return the allocations that need no measurement and fit the budget, by description.

        These are uniform storage, and the largest number of outer layers in more bits.
        """
        found = {f"all {kind}": self.uniform(kind) for kind in self.kinds}
        for inner, outer in combinations(self.kinds, 2):
            # As many layers at the front as at the back, or one more.
            for count in range(self.layers - 1, 0, -1):
                first, last = (count + 1) // 2, count // 2
                storage = self.outer(outer, inner, first, last)
                if self.bytes_of(storage) <= budget_bytes:
                    found[f"first {first} and last {last} layers {outer}, others {inner}"] = storage
                    break
        return {name: storage for name, storage in found.items() if self.bytes_of(storage) <= budget_bytes}


def allocate(choices: Choices, budget_bytes: float) -> dict[str, str]:
    """Return the kind of storage of each layer with the least sum of KLs within a budget for the whole base.

    Raises:
        ConfigError: no allocation fits the budget, or the base fits it in 16 bit.
        FinetuneError: the solver finds no solution.
    """
    # The smallest kind of each layer: 8 bits of a narrow one, with a scale per row, can exceed 16 bits.
    least = choices.rest_bytes + int(choices.size_bytes.min(1).sum())
    most = choices.bytes_of(choices.uniform("none"))
    given, smallest, largest, rest = (f"{size / 1e9:.6g}" for size in (budget_bytes, least, most, choices.rest_bytes))
    sizes = f"every layer in {choices.kinds[0]}={smallest} GB, every layer in 16 bit={largest} GB"
    if budget_bytes < least:
        raise ConfigError(
            f"budget_gb={given}: too small for the base ({sizes}; embedding, head, norms and biases stay in 16 bit, "
            f"{rest} GB)\nhelp: choose a budget between the two"
        )
    if budget_bytes >= most:
        raise ConfigError(f"budget_gb={given}: the base fits in 16 bit ({sizes})\nhelp: set quant.type=none")
    count, kinds = choices.size_bytes.shape
    # Both are scaled, because HiGHS takes values below 1e-6 for zero.
    nats = choices.nats.ravel() * (1e3 / max(choices.nats.sum(), np.finfo(float).tiny))
    share_of_budget = choices.size_bytes.reshape(1, -1) / (budget_bytes - choices.rest_bytes)
    one_kind_per_layer = np.kron(np.eye(count), np.ones(kinds))
    solved = milp(
        nats,
        integrality=np.ones(count * kinds),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_kind_per_layer, 1, 1), LinearConstraint(share_of_budget, -np.inf, 1)],
        options={"mip_rel_gap": 1e-6, "time_limit": _TIME_LIMIT_SECONDS},
    )
    if solved.x is None:
        raise FinetuneError(f"allocation: no solution within {_TIME_LIMIT_SECONDS:.0f} s ({solved.message})")
    chosen = solved.x.reshape(count, kinds).argmax(1)
    storage = {name: choices.kinds[kind] for name, kind in zip(choices.names, chosen, strict=True)}
    if choices.bytes_of(storage) > budget_bytes:
        raise FinetuneError(f"allocation: the solution exceeds the budget ({solved.message})")
    return storage


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
        media = load_media_processor(cfg.model, cfg.data)
        measured = measure_quants(cfg.model, quants, batches, log, media=media)
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
    family = FAMILIES[read_config(folder, model.name)["model_type"]]
    named = ((family.name_in_model(name), stored.shape) for name, stored in tensors.items())
    rest = [shape for name, shape in named if name is not None and name.removesuffix(".weight") not in linears]
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
    model: ModelConfig,
    quants: Mapping[str, QuantConfig],
    batches: Sequence[Batch],
    log: Log = lambda _: None,
    *,
    media: MediaProcessor | None = None,
) -> dict[str, MeanKl]:
    """Measure KL(16 bit || quantized) of each of these settings, with the dtypes and kernels of a run.

    media: from `load_media_processor`, for batches with media.
    """
    device = working_device()
    reference = load_resident(model, None, device).model
    build_towers(base_of(reference), model, media)
    head, vocabulary = head_of(reference), vocabulary_rows(reference)
    wanted = _final_states(reference, batches)
    measured = {}
    for name, quant in quants.items():
        # Used once, so not written to the cache on disk.
        plain = quant.model_copy(update={"cache": False, "keep_dequantized": False})
        base = load_base(model, plain, device)
        fuse_layers(base)
        build_towers(base, model, media)
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
    with os_errors_as(ConfigError, f"out={file}: cannot be written"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, as_yaml(allocation, command, model))


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
