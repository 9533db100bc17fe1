"""A party's update, clipped to a norm and with noise, before it leaves the party.

Source: McMahan et al. 2018, arXiv:1710.06963 (clipped updates and Gaussian noise).
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.config.command_options import ClipOptions
from finetune.config.compose import saved_config
from finetune.export.staging import staged
from finetune.federation.adapters import BASE_COPY, base_record, differences_of, require_zero_start, write_adapter
from finetune.federation.privacy import epsilon
from finetune.models.adapters.files import SavedAdapter, fetch_adapter
from finetune.system.console import Log
from finetune.system.errors import ConfigError

# Values of noise made at a time: 16 MB in float64, and as many random bytes.
_BLOCK = 2**21


@dataclass(frozen=True, slots=True)
class Clipped:
    """A party's adapter after `clip_update`. norm, norm_after: of the update before and after."""

    tensors: dict[str, Tensor]
    norm: float
    norm_after: float


def clip(options: ClipOptions, log: Log) -> None:
    """Write the start of a round plus a party's clipped and noisy update as an adapter folder.

    Raises:
        ConfigError: an adapter is missing, is of another kind than the start, or `out` exists; or delta has no noise.
        IntegrityError: an adapter is corrupt.
    """
    privacy = _privacy(options)
    adapter = fetch_adapter(options.adapter, "adapter")
    start = None if options.start is None else fetch_adapter(options.start, "start")
    _check_start(adapter, start)
    names = trained_names(adapter.tensors, None if start is None else start.tensors)
    seed = secrets.token_bytes(32) if options.seed is None else str(options.seed).encode()
    origin = {} if start is None else start.tensors
    clipped = clip_update(adapter.tensors, origin, names, max_norm=options.max_norm, noise=options.noise, seed=seed)
    # The norms stay at the party: they are functions of its rows that no noise protects.
    record = {
        "command": "clip",
        "base": base_record(adapter),
        "max_norm": options.max_norm,
        "noise": options.noise,
        "trained_values": sum(adapter.tensors[name].numel() for name in names),
    }
    needed = sum(tensor.nbytes for tensor in clipped.tensors.values())
    with staged(Path(options.out).expanduser(), needed) as folder:
        write_adapter(folder, clipped.tensors, adapter.config, record, texts=adapter.folder)
    log(
        f"clip: update_norm={clipped.norm:.6g}, max_norm={options.max_norm:g}, "
        f"noise={options.noise * options.max_norm:g} per value, norm_after={clipped.norm_after:.6g}, "
        f"tensors={len(names)}, values={record['trained_values']:,}"
    )
    if privacy is not None:
        log(
            f"privacy: epsilon={privacy:.4g}, delta={options.delta:g}, updates={options.rounds}, unit=all rows of the "
            "party (no DP-SGD)"
        )


def _privacy(options: ClipOptions) -> float | None:
    """Return epsilon, or None if it is not wanted. Raises: ConfigError if there is none."""
    if options.delta is None:
        return None
    if not options.noise or options.seed is not None:
        found = "noise=0" if not options.noise else f"seed={options.seed}, and known noise can be removed"
        raise ConfigError(f"delta: there is no epsilon, found {found}\nhelp: set noise=5 and no seed, or remove delta")
    return epsilon(options.noise, options.rounds, options.delta)


def clip_update(
    tensors: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    names: Iterable[str],
    *,
    max_norm: float,
    noise: float,
    seed: bytes,
) -> Clipped:
    """Return start + clipped update + noise; frozen tensors, and all if nothing changes them, keep their bits.

    Args:
        tensors: of the adapter.
        start: of the adapter that the round started from; a tensor that it lacks started from zero.
        names: of the trained tensors.
        max_norm: limit on the L2 norm of the update over all trained tensors together.
        noise: standard deviation of a value's noise over `max_norm`.
        seed: of the noise.
    """
    names = list(names)
    norm = update_norm(tensors, start, names)
    factor = min(1.0, max_norm / norm) if norm else 1.0
    changed = dict(tensors)
    if factor < 1 or noise:
        for name in names:
            value = _update(tensors, start, name) * factor
            if noise:
                value += noise * max_norm * gaussian(value.shape, seed, name)
            if name in start:
                value += start[name].double()
            changed[name] = value.to(tensors[name].dtype)
    return Clipped(changed, norm, update_norm(changed, start, names))


def update_norm(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """Return the L2 norm of tensors minus start, over all named ones; one that `start` lacks starts from zero."""
    return math.sqrt(math.fsum(float(_update(tensors, start, name).square().sum()) for name in names))


def rounding_norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the largest change of an update's norm by rounding the tensors to their dtype."""
    return math.hypot(*(torch.finfo(value.dtype).eps * float(value.double().norm()) for value in tensors.values()))


def trained_names(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor] | None) -> list[str]:
    """Return the tensors that a round trains: all but copies of the base's, and but A where every A is the start's.

    start: None for a first round, whose A is frozen.
    """
    factors_a = [name for name in tensors if ".lora_A." in name]
    frozen = start is None or all(torch.equal(tensors[name].double(), start[name].double()) for name in factors_a)
    left_out = {*(factors_a if frozen else ()), *(name for name in tensors if BASE_COPY in name)}
    return [name for name in tensors if name not in left_out]


def gaussian(shape: Iterable[int], seed: bytes, name: str) -> Tensor:
    """Return standard normal values in float64, a function of seed and name alone.

    The Box-Muller transform of SHAKE-256's output. torch's generator on a CPU uses 32 bits of its seed, so that noise
    of it could be found by trying all of them, and removed.
    """
    shape = tuple(shape)
    count = math.prod(shape)
    blocks = [_normal(min(_BLOCK, count - first), seed, f"{name}:{first}") for first in range(0, count, _BLOCK)]
    return torch.cat(blocks).view(shape) if blocks else torch.empty(shape, dtype=torch.float64)


def _normal(count: int, seed: bytes, name: str) -> Tensor:
    pairs = (count + 1) // 2
    words = hashlib.shake_256(len(seed).to_bytes(8, "little") + seed + name.encode()).digest(16 * pairs)
    integers = torch.frombuffer(bytearray(words), dtype=torch.int64) & (2**53 - 1)
    uniform_P = (integers.double() + 0.5) * 2.0**-53  # in (0, 1)
    radius_P, angle_P = (-2 * uniform_P[:pairs].log()).sqrt(), 2 * math.pi * uniform_P[pairs:]
    return torch.cat([radius_P * angle_P.cos(), radius_P * angle_P.sin()])[:count]


def _update(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], name: str) -> Tensor:
    value = tensors[name].double()
    return value - start[name].double() if name in start else value


def _check_start(adapter: SavedAdapter, start: SavedAdapter | None) -> None:
    """Check that the update from the start is known. Raises: ConfigError."""
    if start is not None:
        if problems := differences_of(adapter, start):
            raise ConfigError(f"adapter={adapter.name}: {'; '.join(problems)}")
        return
    require_zero_start(adapter)
    if (config := saved_config(adapter.folder)) is None:
        return
    if (begin := config.lora.init_adapter) is not None:
        raise ConfigError(
            f"start: is missing; the run of adapter={adapter.name} started from lora.init_adapter={begin}\n"
            f"help: start={begin}"
        )
    if not config.lora.freeze_a:
        raise ConfigError(
            f"start: is missing; the run of adapter={adapter.name} trained A too, from a start that is unknown\n"
            "help: name the adapter that it started from, or train with lora.freeze_a=true"
        )
