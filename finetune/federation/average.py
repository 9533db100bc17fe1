"""Averages of adapters in float64.

Every mean is written as the first party plus weighted differences to it, so tensors that are equal at all parties keep
their bits. The caller orders the parties by content, so the sums have the same bits in whatever order they arrive.

Names: O outputs, I inputs, R rank. The update of a module is scaling * B A, with A [R, I] and B [O, R].
Sources: FedAvg, McMahan et al. 2017, arXiv:1602.05629; FFA-LoRA, Sun et al. 2024, arXiv:2403.12313; FedEx-LoRA,
Singhal et al. 2024, arXiv:2410.09432.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class FactorError:
    """How far mean(B) mean(A) is from mean(B A), relative to mean(B A) in the Frobenius norm.

    total: over all modules. worst, worst_module: of the module with the largest one.
    """

    total: float
    worst: float
    worst_module: str


def normalized(weights: Sequence[float]) -> list[float]:
    """Return weights with the sum 1. The sum is exact, so that it has no order."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def mean_tensors(parties: Sequence[Tensors], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of each tensor, rounded once to the dtype of the parties' tensors.

    Args:
        parties: tensors of the same names and shapes.
        weights: one for each party, with the sum 1.
    """
    means = {}
    for name in parties[0]:
        values = [party[name] for party in parties]
        means[name] = _mean(values, weights).to(reduce(torch.promote_types, (value.dtype for value in values)))
    return means


def factor_error(parties: Sequence[Tensors], weights: Sequence[float], scalings: Mapping[str, float]) -> FactorError:
    """Measure the error of averaging A and B apart.

    The weights w have the sum 1, so mean(B A) - mean(B) mean(A) = sum of w (B - mean(B)) (A - mean(A)). No matrix of
    O x I is made: norms come from products of R x R blocks.

    Args:
        parties, weights: as in `mean_tensors`.
        scalings: the factor of B A, by module.
    """
    missed, wanted = {}, {}
    for module, scaling in scalings.items():
        left, right = _factors(parties, module)
        mean_left, mean_right = _mean(left, weights), _mean(right, weights)
        parts = list(zip(weights, left, right, strict=True))
        missed[module] = scaling * _product_norm((w * (b - mean_left), a - mean_right) for w, b, a in parts)
        wanted[module] = scaling * _product_norm((w * b, a) for w, b, a in parts)
    errors = {module: _ratio(missed[module], wanted[module]) for module in scalings}
    worst = max(errors, key=errors.__getitem__)
    return FactorError(_ratio(math.hypot(*missed.values()), math.hypot(*wanted.values())), errors[worst], worst)


def residual(parties: Sequence[Tensors], weights: Sequence[float], modules: Iterable[str]) -> dict[str, Tensor]:
    """Return factors of mean(B A) - mean(B) mean(A) in fp32, of rank (parties - 1) * R.

    It equals the sum of w (B - B of the first party) (A - mean(A)) over the other parties.

    Args:
        parties, weights: as in `mean_tensors`; at least two parties.
        modules: the adapted ones.
    """
    tensors = {}
    for module in modules:
        left, right = _factors(parties, module)
        mean_right = _mean(right, weights)
        others = list(zip(weights, left, right, strict=True))[1:]
        tensors[f"{module}{_A}"] = torch.cat([a - mean_right for _, _, a in others]).float()
        tensors[f"{module}{_B}"] = torch.cat([w * (b - left[0]) for w, b, _ in others], dim=1).float()
    return tensors


def _factors(parties: Sequence[Tensors], module: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parties' B and A of a module in float64."""
    return tuple([party[f"{module}{side}"].double() for party in parties] for side in (_B, _A))  # type: ignore[return-value]


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    first = values[0].double()
    total = first.clone()
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total += weight * (value.double() - first)
    return total


def _product_norm(parts: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the Frobenius norm of a sum of products B A: the root of the trace of (B^T B) (A A^T)."""
    lefts, rights = zip(*parts, strict=True)
    left_OK, right_KI = torch.cat(lefts, dim=1), torch.cat(rights)
    return math.sqrt(max(0.0, float(((left_OK.T @ left_OK) * (right_KI @ right_KI.T)).sum())))


def _ratio(part: float, whole: float) -> float:
    return part / whole if part else 0.0
