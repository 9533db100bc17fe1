"""Allocate a kind of storage to each linear layer, with the least loss within a budget of bytes.

The loss of an allocation is the sum of the layers' KLs to the 16-bit model, each measured alone. In fp32 that sum is
within a fifth of the KL of all changes together (docs/mixed-precision.md), so it orders allocations well. This is a
multiple-choice knapsack; HiGHS solves it to optimality.
Source: Sinha and Zoltners 1979, Operations Research 27(3), the multiple-choice knapsack problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from finetune.mixed_precision.journal import Sensitivities, layer_of
from finetune.models.quant.bit_widths import stored_bytes
from finetune.system.errors import ConfigError, FinetuneError

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
