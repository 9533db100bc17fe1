"""LoRA adapters as the ragged forward pass reads them: rounded factors by layer, without modules of PEFT."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from finetune.models.adapters.files import fetch_adapter, other_base, other_updates, scaling_of
from finetune.models.adapters.folder import check_adapter_folder
from finetune.models.adapters.names import PREFIX
from finetune.models.decoder import decoder_of, family_in
from finetune.ops.lora import Adapter, Stack, stack_adapters
from finetune.system.errors import ConfigError

# Linear layers of a decoder layer that read one input each, in the order of the forward pass.
INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_serials = itertools.count(1)


@dataclass(frozen=True, eq=False, slots=True)
class LoadedAdapter:
    """An adapter in memory. origin: differs for each load. stacks: [layer][input] as in INPUTS, for `add_adapters_`."""

    name: str
    origin: bytes
    stacks: list[list[list[Stack]]]


def load_lora(name: str, folder: Path, base: PreTrainedModel) -> LoadedAdapter:
    """Read a LoRA adapter of a base.

    Raises:
        ConfigError: lists why the adapter cannot be served on this base.
        IntegrityError: it is corrupt.
    """
    key = f"adapters.{name}"
    check_adapter_folder(folder, key)
    saved = fetch_adapter(str(folder), key)
    updates = list(_other_kinds(saved.config))
    factors, superfluous = _factors(saved.tensors, saved.config, base)
    updates += [f"{tensor}: no LoRA factor of a linear layer of the decoder" for tensor in superfluous]
    if updates:
        advice = f"help: finetune merge adapter={folder} out=FOLDER, then finetune serve model=FOLDER"
        raise ConfigError("\n".join([f"{key}={folder}: not plain LoRA:", *_first(updates), advice]))
    if problems := list(_misshapen(factors, base)):
        help_line = "help: serve the adapter on the base that it was trained on"
        raise ConfigError("\n".join([f"{key}={folder}: made for another base:", *_first(problems), help_line]))
    family, layers = family_in(base), len(decoder_of(base).layers)
    stacks = [
        [
            stack_adapters(found, [None] * len(found), base.dtype)
            for linears in INPUTS
            for found in [[_placed(factors.get(family.linear_path(i, linear)), base) for linear in linears]]
        ]
        for i in range(layers)
    ]
    return LoadedAdapter(name, next(_serials).to_bytes(8, "little"), stacks)


def _first(problems: list[str], most: int = 10) -> list[str]:
    return [*problems[:most], *([f"… and {len(problems) - most} more"] if len(problems) > most else [])]


def _other_kinds(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings with which the update of an adapter is not LoRA on linear layers."""
    yield from other_updates(config)
    if config.get("use_dora"):
        yield "use_dora=True: DoRA also scales the weights"
    if (init := other_base(config)) is not None:
        yield f"init_lora_weights={init}: the adapter needs other weights than its base has"


def _factors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: PreTrainedModel
) -> tuple[dict[str, Adapter], list[str]]:
    """Return the factors by full name of their layer, and the names of all other tensors."""
    family = family_in(base)
    linears = {linear for linears in INPUTS for linear in linears}
    factors, others = {}, []
    for name, a_RD in tensors.items():
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        if not module.startswith(f"{family.decoder}.layers.") or module.rpartition(".")[2] not in linears:
            others.append(name)
        elif part == "A.weight":
            b_OR = tensors[name.replace(".lora_A.", ".lora_B.")]
            factors[module] = Adapter(a_RD, b_OR, scaling_of(config, module, len(a_RD)))
        elif part != "B.weight":
            others.append(name)
    return factors, others


def _misshapen(factors: Mapping[str, Adapter], base: PreTrainedModel) -> Iterator[str]:
    """Yield the layers that the base does not have, or has in another shape."""
    for name, adapter in factors.items():
        try:
            layer: Any = base.get_submodule(name)
        except AttributeError:
            yield f"{name}: the base has no such layer"
            continue
        wanted = (adapter.b.shape[0], adapter.a.shape[1])
        if wanted != (layer.out_features, layer.in_features):
            yield f"{name}: the adapter is for {list(wanted)}, the base has {[layer.out_features, layer.in_features]}"


def _placed(adapter: Adapter | None, base: PreTrainedModel) -> Adapter | None:
    """Return an adapter with rounded factors on the device of the base."""
    if adapter is None:
        return None
    a_RD, b_OR = (factor.to(base.device, base.dtype) for factor in (adapter.a, adapter.b))
    return Adapter(a_RD, b_OR, adapter.scale)
