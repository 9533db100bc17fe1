"""How to store each layer so that the least is lost within a budget of bytes.

One kind of storage is chosen for each linear layer; the choices' bytes must add up to no more than the budget, and
their KL to the 16-bit model, each measured alone, to as little as can be: a knapsack with one item of each class,
solved to optimality by HiGHS. In fp32 single KLs add up to within a fifth of what all changes do together (docs/
mixed-precision.md), so the sum orders choices well.
Source: Sinha and Zoltners 1979, Operations Research 27(3), the multiple-choice knapsack problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from finetune.mixed_precision.journal import Sensitivities, layer_of
from finetune.models.quant.bit_widths import stored_bytes
from finetune.system.errors import ConfigError, FinetuneError

# What HiGHS may leave of a gap to the optimum, and how long it may take; 588 choices take a second.
_GAP, _LIMIT_SECONDS = 1e-6, 60.0
_GB = 1e9


@dataclass(frozen=True)
class Choices:
    """What there is to choose from.

    kinds: of storage, none (16 bit) the last. size_bytes, nats [M, K]: of each linear, in the order of `names`, in each
    kind; nats are KLs measured alone, 0 in 16 bit. rest_bytes: everything that is no linear layer of a block.
    """

    names: list[str]
    kinds: list[str]
    size_bytes: np.ndarray
    nats: np.ndarray
    rest_bytes: int

    @staticmethod
    def of(found: Sensitivities, rest_bytes: int, double: bool, dtype: str) -> Choices:
        """double, dtype: of the config. Raises: ConfigError for sensitivities of another mode than `only`."""
        if found.mode != "only":
            raise ConfigError("sensitivity: measured with mode=keep; measure with mode=only, each layer alone")
        kinds = [*found.kinds, "none"]
        sizes = [[stored_bytes(kind, shape, double, dtype) for kind in kinds] for shape in found.shapes.values()]
        nats = [[max(0.0, found.measured[name, kind].kl) for kind in found.kinds] + [0.0] for name in found.shapes]
        return Choices(list(found.shapes), kinds, np.array(sizes), np.array(nats), rest_bytes)

    @property
    def layers(self) -> int:
        return 1 + max(map(layer_of, self.names))

    def bytes_of(self, storage: Mapping[str, str]) -> int:
        """Bytes of the whole base, embedding and head included, with its layers stored so."""
        return self.rest_bytes + sum(
            int(sizes[self.kinds.index(storage[name])]) for name, sizes in zip(self.names, self.size_bytes, strict=True)
        )

    def nats_of(self, storage: Mapping[str, str]) -> float:
        """The sum of what was measured alone."""
        return sum(
            float(nats[self.kinds.index(storage[name])]) for name, nats in zip(self.names, self.nats, strict=True)
        )

    def uniform(self, kind: str) -> dict[str, str]:
        """Every layer stored as one kind."""
        return dict.fromkeys(self.names, kind)

    def outer(self, outer: str, inner: str, first: int, last: int) -> dict[str, str]:
        """The first and the last layers stored as one kind, those between as another: the usual rule of thumb."""
        edge = self.layers - last
        return {name: outer if layer_of(name) < first or layer_of(name) >= edge else inner for name in self.names}

    def simple(self, budget_bytes: float) -> dict[str, dict[str, str]]:
        """What one would choose without measuring and that fits, by a description: uniform storage, and the largest
        number of outer layers in more bits."""
        choices = {f"all {kind}": self.uniform(kind) for kind in self.kinds}
        for place, inner in enumerate(self.kinds):
            for outer in self.kinds[place + 1 :]:
                # One more at the front than at the back, or as many.
                for count in range(self.layers - 1, 0, -1):
                    first, last = (count + 1) // 2, count // 2
                    storage = self.outer(outer, inner, first, last)
                    if self.bytes_of(storage) <= budget_bytes:
                        choices[f"first {first} and last {last} layers {outer}, others {inner}"] = storage
                        break
        return {name: storage for name, storage in choices.items() if self.bytes_of(storage) <= budget_bytes}


def allocate(choices: Choices, budget_bytes: float) -> dict[str, str]:
    """The storage of each layer with the least sum of nats within a budget of the whole base.

    Raises: ConfigError for a budget that nothing fits, or that everything in 16 bit fits; FinetuneError if the solver
    finds no solution.
    """
    _check_budget(choices, budget_bytes)
    count, kinds = choices.size_bytes.shape
    # Scaled: HiGHS takes what is smaller than 1e-6 for zero.
    nats = choices.nats.ravel() * (1e3 / max(choices.nats.sum(), np.finfo(float).tiny))
    room_bytes = budget_bytes - choices.rest_bytes
    one_of_each = np.kron(np.eye(count), np.ones(kinds))
    # Bytes as a share of the room, for the same reason.
    solved = milp(
        nats,
        integrality=np.ones(count * kinds),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_of_each, 1, 1),
            LinearConstraint(choices.size_bytes.reshape(1, -1) / room_bytes, -np.inf, 1),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": _LIMIT_SECONDS},
    )
    if solved.x is None:
        raise FinetuneError(f"no allocation was found within {_LIMIT_SECONDS:.0f} seconds: {solved.message}")
    chosen = solved.x.reshape(count, kinds).argmax(1)
    storage = {name: choices.kinds[kind] for name, kind in zip(choices.names, chosen, strict=True)}
    if choices.bytes_of(storage) > budget_bytes:
        raise FinetuneError(f"the solver's choice is above the budget: {solved.message}")
    return storage


def _check_budget(choices: Choices, budget_bytes: float) -> None:
    # Of each layer the smallest: 8 bits of a narrow one, with a scale for each row, may be more than 16.
    least = choices.rest_bytes + int(choices.size_bytes.min(1).sum())
    most = choices.bytes_of(choices.uniform("none"))
    if least <= budget_bytes < most:
        return
    given, smallest, largest = (f"{size / _GB:.6g}" for size in (budget_bytes, least, most))
    if budget_bytes < least:
        raise ConfigError(
            f"budget_gb={given}: the base takes {smallest} GB with every layer in {choices.kinds[0]} (of which "
            f"{choices.rest_bytes / _GB:.6g} are embedding, head, norms and biases, which stay in 16 bit), and "
            f"{largest} in 16 bit; name a budget between the two"
        )
    raise ConfigError(
        f"budget_gb={given}: the base fits in 16 bit, with {largest} GB, so there is nothing to choose: set "
        f"quant.type=none; with every layer in {choices.kinds[0]} it takes {smallest}"
    )
