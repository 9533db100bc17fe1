"""Deltas: the changes of an adapter to a tensor of its base, as functions of a block of rows.

A matrix is merged one block of rows at a time, so it is never in memory in fp32 as a whole.
Shapes: weight_OI [rows of the block, in]; lora_A [R, in], lora_B [out, R], both fp32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Delta(Protocol):
    """The change of one tensor.

    rows: number of rows of the changed tensor; None keeps the base's.
    whole: `apply` must get all rows at once.
    """

    @property
    def rows(self) -> int | None: ...

    @property
    def whole(self) -> bool: ...

    def apply(self, block: Tensor, start: int) -> Tensor:
        """Return the changed rows in fp32 from the base's fp32 rows, the first of them row `start`."""
        ...


@dataclass(frozen=True)
class LowRank:
    """W + scaling B A; DoRA's magnitudes then give each row its learned length.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685; DoRA, Liu et al. 2024, arXiv:2402.09353.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    rows: int | None = None
    whole: bool = False

    def apply(self, block: Tensor, start: int) -> Tensor:
        factors_OR = self.lora_B[start : start + len(block)]
        changed_OI = torch.addmm(block, factors_OR, self.lora_A, alpha=self.scaling)
        if self.magnitude is None:
            return changed_OI
        lengths_O = self.magnitude[start : start + len(block)]
        return changed_OI * (lengths_O / torch.linalg.vector_norm(changed_OI, dim=1))[:, None]


@dataclass(frozen=True)
class Replaced:
    """A tensor that was trained in full."""

    tensor: Tensor
    whole: bool = False

    @property
    def rows(self) -> int:
        return len(self.tensor)

    def apply(self, block: Tensor, start: int) -> Tensor:
        return self.tensor[start : start + len(block)].float()


@dataclass(frozen=True)
class NewRows:
    """Trained rows of a table of tokens; rows beyond its end make it grow."""

    ids: Tensor  # int64 [N]
    values: Tensor  # [N, D]
    whole: bool = False

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
class Combined:
    """Several deltas of one tensor with weights: W + sum of w (changed - W).

    combine: None is that sum; otherwise a function of PEFT. TIES and DARE get the whole update of the tensor. PEFT's
    own adapter merging passes the factors A and B instead, which prunes other values.
    Source: task arithmetic, Ilharco et al. 2022, arXiv:2212.04089; TIES, Yadav et al. 2023, arXiv:2306.01708; DARE,
    Yu et al. 2023, arXiv:2311.03099.
    """

    deltas: Sequence[Delta]
    weights: Sequence[float]
    combine: Combine | None
    density: float
    seed: int

    @property
    def whole(self) -> bool:
        return self.combine is not None

    @property
    def rows(self) -> int | None:
        return max((delta.rows for delta in self.deltas if delta.rows is not None), default=None)

    def apply(self, block: Tensor, start: int) -> Tensor:
        if self.combine is None:
            changed = block.clone()
            for delta, weight in zip(self.deltas, self.weights, strict=True):
                changed += weight * _update(delta, block, start)
            return changed
        updates = [_update(delta, block, start) for delta in self.deltas]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return block + self.combine(updates, torch.tensor(list(self.weights)), self.density)


def _update(delta: Delta, block: Tensor, start: int) -> Tensor:
    """Return what a delta adds to a block; plain LoRA avoids the rounding of a sum and its difference."""
    if isinstance(delta, LowRank) and delta.magnitude is None:
        return delta.scaling * (delta.lora_B[start : start + len(block)] @ delta.lora_A)
    return delta.apply(block, start) - block


def combine_deltas(
    parts: Sequence[dict[str, Delta]], weights: Sequence[float], combination: str, density: float, seed: int
) -> dict[str, Delta]:
    """Combine the deltas of several adapters, by tensor; an adapter without a delta of a tensor adds nothing to it."""
    if len(parts) == 1 and weights[0] == 1.0:
        return parts[0]
    from peft.utils import merge_utils

    functions: dict[str, Combine | None] = {
        "linear": None,
        "ties": merge_utils.ties,
        "dare_linear": merge_utils.dare_linear,
        "dare_ties": merge_utils.dare_ties,
    }
    combined: dict[str, Delta] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        own = [(part[name], weight) for part, weight in zip(parts, weights, strict=True) if name in part]
        # One seed for each tensor, independent of the other tensors.
        tensor_seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "little")
        combined[name] = Combined(
            [delta for delta, _ in own], [weight for _, weight in own], functions[combination], density, tensor_seed
        )
    return combined
