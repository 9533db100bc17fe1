"""One round at the server: read the adapters of the parties, leave out or refuse bad ones, average the rest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.config.command_options import AggregateOptions
from finetune.export.staging import staged
from finetune.federation.adapters import (
    base_record,
    differences_of,
    listed,
    require_zero_start,
    scalings_of,
    write_adapter,
)
from finetune.federation.average import FactorError, Tensors, factor_error, mean_tensors, normalized, residual
from finetune.federation.clip import rounding_norm, trained_names, update_norm
from finetune.models.adapters.files import SavedAdapter, fetch_adapter, other_base, other_updates
from finetune.models.adapters.folder import TENSOR_FILE
from finetune.models.adapters.names import is_factor
from finetune.system.console import Log
from finetune.system.errors import ConfigError, FinetuneError
from finetune.system.manifest import sha256_of

RESIDUAL = "residual"  # folder of fedex's second adapter
_LEAVE_OUT = "help: on_bad_party=leave_out goes on without them"


@dataclass(frozen=True)
class Party:
    """A party's adapter.

    digest: SHA-256 of its tensors' file, by which parties are ordered. base: from `base_record`. norm: of its update.
    """

    adapter: SavedAdapter
    weight: float
    digest: str
    base: Mapping[str, Any]
    norm: float | None = None

    @property
    def name(self) -> str:
        return self.adapter.name


# Returns the problems of a party, found without the others.
Check = Callable[[Party], Sequence[str]]


class _Parties:
    """The parties of a round that are left, and the problems of the others by name."""

    def __init__(self, parties: Sequence[Party], bad: dict[str, str]):
        self.left = sorted(parties, key=lambda party: (party.digest, party.weight, party.name))
        self.bad = bad

    def require(self, check: Check) -> None:
        """Drop the parties with a problem."""
        found = {party.name: "; ".join(check(party)) for party in self.left}
        self.bad |= {name: text for name, text in found.items() if text}
        self.left = [party for party in self.left if not found[party.name]]


def aggregate(options: AggregateOptions, log: Log) -> None:
    """Average the adapters of parties and write the mean as an adapter folder.

    Raises:
        ConfigError: lists every bad party, or the options contradict each other, or `out` exists.
        IntegrityError: the start is corrupt.
    """
    _check_options(options)
    start = None if options.start is None else fetch_adapter(options.start, "start")
    parties = _read(options)
    _drop_bad(parties, start, options)
    if parties.bad and (options.on_bad_party == "error" or not parties.left):
        faults = [f"  {name}: {text}" for name, text in parties.bad.items()]
        count = f"{len(parties.bad)} of {len(options.adapters)} parties cannot be averaged"
        raise ConfigError("\n".join([f"adapters: {count}:", *faults, *([_LEAVE_OUT] if parties.left else [])]))
    for name, text in parties.bad.items():
        log(f"aggregate: left out: {name}: {text}")
    _write(parties.left, parties.bad, start, options, log)


def _check_options(options: AggregateOptions) -> None:
    problems = []
    folders = Counter(Path(name).expanduser().resolve() for name in options.adapters)
    problems += [f"adapters: {folder} is named {count} times" for folder, count in folders.items() if count > 1]
    if options.weights is not None and len(options.weights) != len(options.adapters):
        problems.append(
            f"weights: expected one for each of {len(options.adapters)} adapters, found {len(options.weights)}"
        )
    if options.max_error and options.method != "fedavg":
        problems.append(f"max_error: only method=fedavg makes an error, found method={options.method}; remove it")
    if options.max_norm is not None and options.start is None and options.method != "ffa":
        problems.append(f"max_norm: the update of A is unknown without start=ADAPTER, found method={options.method}")
    if problems:
        raise ConfigError("\n".join(problems))


def _read(options: AggregateOptions) -> _Parties:
    bad: dict[str, str] = {}
    parties = []
    for name, weight in zip(options.adapters, options.weights or [1.0] * len(options.adapters), strict=True):
        try:
            adapter = fetch_adapter(name, "adapters")
            if not weight > 0:
                raise ConfigError(f"weight: must be greater than 0, found {weight:g}")
            parties.append(Party(adapter, weight, sha256_of(adapter.folder / TENSOR_FILE), base_record(adapter)))
        except FinetuneError as error:
            bad[name] = str(error).partition("\n")[0].removeprefix(f"adapters={name}: ")
    return _Parties(parties, bad)


def _drop_bad(parties: _Parties, start: SavedAdapter | None, options: AggregateOptions) -> None:
    """Find every bad party; later checks rely on the earlier ones."""
    parties.require(_not_summed)
    _agree(parties, start, differences_of, options)
    if options.method == "ffa":
        _agree(parties, start, _other_a, options)
    if options.method == "fedex":
        parties.require(_quantized)
    if options.max_norm is not None or start is not None:
        if start is None and parties.left:
            require_zero_start(parties.left[0].adapter)
        origin = {} if start is None else start.tensors
        parties.left = [_measured(party, origin) for party in parties.left]
    if options.max_norm is not None:
        limit = options.max_norm
        parties.require(lambda party: _too_large(party, limit))


def _agree(
    parties: _Parties,
    start: SavedAdapter | None,
    differ: Callable[[SavedAdapter, SavedAdapter], Sequence[str]],
    options: AggregateOptions,
) -> None:
    """Drop the parties that differ from the start; without one, from most parties.

    Raises: ConfigError if parties may be left out, and no kind has most of them.
    """
    if start is not None:
        parties.require(lambda party: differ(party.adapter, start))
        return
    groups: list[list[Party]] = []
    for party in parties.left:
        same = next((group for group in groups if not differ(party.adapter, group[0].adapter)), None)
        groups.append([party]) if same is None else same.append(party)
    if not groups:
        return
    groups.sort(key=len, reverse=True)
    if len(groups) > 1 and len(groups[0]) == len(groups[1]) and options.on_bad_party == "leave_out":
        text = "; ".join(differ(groups[1][0].adapter, groups[0][0].adapter))
        raise ConfigError(
            f"adapters: no kind has the most parties: {groups[1][0].name}: {text}\n"
            "help: start=ADAPTER decides which parties are left out"
        )
    parties.require(lambda party: differ(party.adapter, groups[0][0].adapter))


def _other_a(adapter: SavedAdapter, other: SavedAdapter) -> list[str]:
    """Return how A differs from that of another adapter."""
    for name, tensor in adapter.tensors.items():
        if ".lora_A." in name and not torch.equal(tensor.double(), other.tensors[name].double()):
            return [
                f"A: {name} differs from that of {other.name}, so a mean of B is not the mean of the updates; train "
                "every party with lora.freeze_a=true and one train.seed or lora.init_adapter, or set method=fedex"
            ]
    return []


def _not_summed(party: Party) -> list[str]:
    config, tensors = party.adapter.config, party.adapter.tensors
    problems = list(other_updates(config))
    other = [name for name in tensors if ".lora_" in name and not is_factor(name)]
    other += [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if other and not config.get("use_dora"):
        problems.append(f"tensors: {listed(other)}: no factors or weights that have a mean")
    if config.get("use_dora"):
        problems.append("use_dora: means of DoRA's magnitudes are not exact")
    if init := other_base(config):
        problems.append(f"init_lora_weights={init}: the adapter needs other base weights")
    return problems


def _quantized(party: Party) -> list[str]:
    quant = party.base["quant"]
    if quant in (None, "none"):
        return []
    return [f"quant.type={quant}: method=fedex changes the base, and a quantized one cannot take it; set method=ffa"]


def _measured(party: Party, origin: Tensors) -> Party:
    tensors = party.adapter.tensors
    return replace(party, norm=update_norm(tensors, origin, trained_names(tensors, origin or None)))


def _too_large(party: Party, limit: float) -> list[str]:
    """Compare the norm of an update with the limit, with room for the rounding of a clipped one."""
    norm, room = party.norm or 0.0, rounding_norm(party.adapter.tensors)
    return [f"update: norm {norm:.6g} is above max_norm={limit:g}"] if norm > limit + room else []


def _write(
    parties: Sequence[Party], bad: dict[str, str], start: SavedAdapter | None, options: AggregateOptions, log: Log
) -> None:
    weights = normalized([party.weight for party in parties])
    tensors, first = [party.adapter.tensors for party in parties], parties[0].adapter
    scalings = scalings_of(first)
    error = factor_error(tensors, weights, scalings)
    log(
        f"aggregate: method={options.method}, parties={len(parties)}, left_out={len(bad)}, "
        f"error of mean(B) mean(A)={error.total:.3g} (largest: {error.worst:.3g} in {error.worst_module})"
    )
    if options.method == "fedavg":
        _require_small(error, options.max_error)
    means = mean_tensors(tensors, weights)
    rest = residual(tensors, weights, scalings) if options.method == "fedex" and len(parties) > 1 else {}
    record = _record(parties, weights, bad, options, error)
    needed = sum(tensor.nbytes for tensor in (*means.values(), *rest.values()))
    with staged(Path(options.out).expanduser(), needed) as folder:
        write_adapter(folder, means, first.config, record, texts=first.folder)
        if rest:
            (folder / RESIDUAL).mkdir()
            write_adapter(folder / RESIDUAL, rest, _residual_config(first.config, len(parties) - 1), record)


def _require_small(error: FactorError, limit: float) -> None:
    if error.total > limit:
        raise ConfigError(
            f"max_error={limit:g}: method=fedavg averages A and B apart, which misses the mean of the updates by "
            f"{error.total:.3g} of its norm (largest: {error.worst:.3g} in {error.worst_module})\n"
            "help: train with lora.freeze_a=true and set method=ffa, or set method=fedex; both are exact\n"
            f"help: max_error={math.ceil(error.total * 1000) / 1000:g} accepts the error"
        )


def _record(
    parties: Sequence[Party],
    weights: Sequence[float],
    bad: Mapping[str, str],
    options: AggregateOptions,
    error: FactorError,
) -> dict[str, Any]:
    """Return the content of federation.json."""
    return {
        "command": "aggregate",
        "method": options.method,
        "base": parties[0].base,
        "parties": [
            {"name": party.name, "weight": weight, "sha256": party.digest, "update_norm": party.norm}
            for party, weight in zip(parties, weights, strict=True)
        ],
        "left_out": dict(sorted(bad.items())),
        "start": options.start,
        "max_norm": options.max_norm,
        "factor_error": error.total,
        "largest_factor_error": error.worst,
    }


def _residual_config(config: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """Return the settings of an adapter with so many times the rank of another one, and its scale of B A."""
    of_alpha = factor**0.5 if config.get("use_rslora") else factor
    changed = {
        "r": config.get("r", 8) * factor,
        "lora_alpha": config.get("lora_alpha", 8) * of_alpha,
        "rank_pattern": {key: rank * factor for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: alpha * of_alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
        "modules_to_save": None,
        "trainable_token_indices": None,
    }
    return {**config, **changed}
