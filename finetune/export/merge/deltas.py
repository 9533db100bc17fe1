"""Deltas: the changes of adapters to the tensors of their base, as functions of a block of rows.

A matrix is merged one block of rows at a time, so it is never in memory in fp32 as a whole.
Shapes: weight_OI [rows of the block, in]; lora_A [R, in], lora_B [out, R], both fp32.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.utils import merge_utils
from torch import Tensor

from finetune.config.command_options import MergeOptions
from finetune.models.adapters.files import SavedAdapter, other_base, other_updates, scaling_of, token_ids
from finetune.models.adapters.names import PREFIX
from finetune.models.safetensors_index import Stored
from finetune.system.errors import ConfigError
from finetune.system.format import first_lines

_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
_FROZEN = ".base_layer."
_LISTED_PROBLEMS = 10


class Delta(ABC):
    """The change of one tensor."""

    @property
    def rows(self) -> int | None:
        """Number of rows of the changed tensor; None keeps the base's."""
        return None

    @property
    def whole(self) -> bool:
        """Whether `apply` must get all rows at once."""
        return False

    @abstractmethod
    def apply(self, block: Tensor, start: int) -> Tensor:
        """Return the changed rows in fp32 from the base's fp32 rows, the first of them row `start`."""


@dataclass(frozen=True)
class LowRank(Delta):
    """W + scaling B A; DoRA's magnitudes then give each row its learned length.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685; DoRA, Liu et al. 2024, arXiv:2402.09353.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None

    def apply(self, block: Tensor, start: int) -> Tensor:
        factors_OR = self.lora_B[start : start + len(block)]
        changed_OI = torch.addmm(block, factors_OR, self.lora_A, alpha=self.scaling)
        if self.magnitude is None:
            return changed_OI
        lengths_O = self.magnitude[start : start + len(block)]
        return changed_OI * (lengths_O / torch.linalg.vector_norm(changed_OI, dim=1))[:, None]


@dataclass(frozen=True)
class Replaced(Delta):
    """A tensor that was trained in full."""

    tensor: Tensor

    @property
    def rows(self) -> int:
        return len(self.tensor)

    def apply(self, block: Tensor, start: int) -> Tensor:
        return self.tensor[start : start + len(block)].float()


@dataclass(frozen=True)
class NewRows(Delta):
    """Trained rows of a table of tokens; rows beyond its end make it grow."""

    ids: Tensor  # int64 [N]
    values: Tensor  # [N, D]

    @property
    def rows(self) -> int:
        return int(self.ids.max()) + 1

    def apply(self, block: Tensor, start: int) -> Tensor:
        inside = (self.ids >= start) & (self.ids < start + len(block))
        changed = block.clone()
        changed[self.ids[inside] - start] = self.values[inside].float()
        return changed


# PEFT's functions of this signature: updates, their weights, the density.
Combine = Callable[[list[Tensor], Tensor, float], Tensor]


@dataclass(frozen=True)
class Combined(Delta):
    """Several deltas of one tensor with weights: W + sum of w (changed - W).

    combine: None is that sum; otherwise a function of PEFT. TIES and DARE get the whole update of the tensor. PEFT's
    own adapter merging passes the factors A and B instead, which prunes other values.
    Source: task arithmetic, Ilharco et al. 2022, arXiv:2212.04089; TIES, Yadav et al. 2023, arXiv:2306.01708; DARE,
    Yu et al. 2023, arXiv:2311.03099.
    """

    parts: Sequence[tuple[Delta, float]]
    combine: Combine | None
    density: float
    seed: int

    @property
    def whole(self) -> bool:
        return self.combine is not None

    @property
    def rows(self) -> int | None:
        return max((delta.rows for delta, _ in self.parts if delta.rows is not None), default=None)

    def apply(self, block: Tensor, start: int) -> Tensor:
        if self.combine is None:
            changed = block.clone()
            for delta, weight in self.parts:
                changed += weight * _update(delta, block, start)
            return changed
        updates = [_update(delta, block, start) for delta, _ in self.parts]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return block + self.combine(updates, torch.tensor([weight for _, weight in self.parts]), self.density)


def _update(delta: Delta, block: Tensor, start: int) -> Tensor:
    """Return what a delta adds to a block; plain LoRA avoids the rounding of a sum and its difference."""
    if isinstance(delta, LowRank) and delta.magnitude is None:
        return delta.scaling * (delta.lora_B[start : start + len(block)] @ delta.lora_A)
    return delta.apply(block, start) - block


def combine_deltas(
    parts: Sequence[dict[str, Delta]], weights: Sequence[float], options: MergeOptions
) -> dict[str, Delta]:
    """Combine the deltas of several adapters, by tensor; an adapter without a delta of a tensor adds nothing to it."""
    if len(parts) == 1 and weights[0] == 1.0:
        return parts[0]
    combine = None if options.combination == "linear" else getattr(merge_utils, options.combination)
    combined: dict[str, Delta] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        own = [(part[name], weight) for part, weight in zip(parts, weights, strict=True) if name in part]
        # One seed for each tensor, independent of the other tensors.
        tensor_seed = int.from_bytes(hashlib.sha256(f"{options.seed}:{name}".encode()).digest()[:6], "little")
        combined[name] = Combined(own, combine, options.density or 1.0, tensor_seed)
    return combined


def read_deltas(adapter: SavedAdapter, base: Mapping[str, Stored]) -> dict[str, Delta]:
    """Return the delta of each tensor that the adapter changes.

    base: the base's tensors by their names in the model; a tied head has its own name.

    Raises:
        ConfigError: lists everything that does not fit the base or cannot be merged.
    """
    problems = list(other_updates(adapter.config))
    if (init := other_base(adapter.config)) and init != "loftq":  # LoftQ's other base is the dequantized one.
        problems.append(
            f"init_lora_weights={init}: the adapter needs other base weights; let PEFT convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    deltas: dict[str, Delta] = {}
    left = {name.removeprefix(PREFIX): tensor for name, tensor in adapter.tensors.items()}
    for name in [name for name in left if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        lora_A, lora_B = left.pop(name).float(), left.pop(f"{module}.lora_B.weight").float()
        magnitudes = (f"{module}.lora_magnitude_vector", f"{module}.lora_magnitude_vector.weight")
        magnitude = next((left.pop(key).float().flatten() for key in magnitudes if key in left), None)
        deltas[f"{module}.weight"] = LowRank(lora_A, lora_B, scaling_of(adapter.config, module, len(lora_A)), magnitude)
    ids = token_ids(adapter.config)
    for name in [name for name in left if name.endswith(_TOKEN_ROWS)]:
        module = name.removesuffix(_TOKEN_ROWS)
        rows = next((rows for key, rows in ids.items() if f".{module}".endswith(f".{key}")), [])
        deltas[f"{module}.weight"] = NewRows(torch.tensor(rows, dtype=torch.int64), left.pop(name))
    for name in [name for name in left if _FROZEN in name]:
        # PEFT saves the frozen weight of an adapted head, and the bias, which it may have trained.
        tensor, plain = left.pop(name), name.replace(_FROZEN, ".")
        if plain not in deltas:
            left[plain] = tensor
    for name in [name for name in left if name in base]:
        deltas[name] = Replaced(left.pop(name))
    problems += [f"{name}: the base has no such tensor, or its kind cannot be merged" for name in left]
    problems += _misfits(deltas, base)
    if problems:
        listed = first_lines((f"  {problem}" for problem in problems), len(problems), _LISTED_PROBLEMS)
        raise ConfigError("\n".join([f"adapter={adapter.name}: cannot be merged into this base:", *listed]))
    return deltas


def _misfits(deltas: Mapping[str, Delta], base: Mapping[str, Stored]) -> Iterator[str]:
    for name, delta in deltas.items():
        if name not in base:
            yield f"{name}: the base has no such tensor"
            continue
        shape = base[name].shape
        match delta:
            case LowRank():
                wanted = (len(delta.lora_B), delta.lora_A.shape[1])
                fits = wanted == shape
            case Replaced():
                wanted = tuple(delta.tensor.shape)
                fits = wanted[1:] == shape[1:] and wanted[0] >= shape[0]  # Tables of tokens may grow.
            case NewRows():
                wanted = (delta.rows, delta.values.shape[1])
                fits = wanted[1:] == shape[1:]
            case _:
                continue
        if not fits:
            yield f"{name}: the base has shape {list(shape)}, the adapter needs {list(wanted)}"


def untie(deltas: dict[str, Delta], head_name: str, embedding_name: str) -> bool:
    """Return whether the adapter changed a tied head alone, so that the head becomes a tensor of its own.

    PEFT saves equal deltas of the head and the embedding for tied modules; the head's delta is then dropped.
    """
    if head_name not in deltas:
        return False
    head, embedding = deltas[head_name], deltas.get(embedding_name)
    same_kind = isinstance(head, Replaced | NewRows) and type(head) is type(embedding)
    if same_kind and all(map(torch.equal, vars(head).values(), vars(embedding).values())):
        del deltas[head_name]
        return False
    return True
