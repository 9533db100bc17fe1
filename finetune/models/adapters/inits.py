"""Initial factors of an adapter, where they depend on the base's weights or PEFT's own init is not exact.

PEFT 0.21 makes orthogonal factors in the base's dtype (integers on a quantized base). It rounds PiSSA and OLoRA factors
to bf16 after subtracting the unrounded ones from the base. Its LoftQ needs CUDA and assumes alpha = rank. These are the
same formulas on fp32 factors, and exact.

Shapes: weight_OI [out, in]; lora_A [R, in]; lora_B [out, R]. The update of the weight is scaling * lora_B @ lora_A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from finetune.models.adapters.targets import CHANGES_BASE

ADAPTER = "default"  # the name of the one adapter that the package trains
Factors = tuple[Tensor, Tensor]


def orthogonal(weight_OI: Tensor, rank: int, scaling: float) -> Factors:
    """Return nonzero factors with a product of zero: rows of A and columns of B are orthogonal.

    Source: datta0.github.io/posts/rethink-lora-init, like PEFT's `orthogonal`.
    """
    basis_RR = torch.linalg.qr(torch.randn(rank, rank))[0]
    lora_A = (torch.randn(weight_OI.shape[1], rank // 2) @ basis_RR[0::2]).T / 10.0
    lora_B = (torch.randn(rank // 2, weight_OI.shape[0]).T @ basis_RR[1::2]) / 10.0
    return lora_A, lora_B


def principal(weight_OI: Tensor, rank: int, scaling: float, power_iterations: int | None = None) -> Factors:
    """Return the best approximation of the weight at this rank: scaling * B @ A is its truncated SVD.

    power_iterations: of a randomized SVD; None is the exact SVD.
    Source: PiSSA, Meng et al. 2024, arXiv:2404.02948.
    """
    if power_iterations is None:
        left_OK, values_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        left_OK, values_K, right_IK = torch.svd_lowrank(weight_OI, rank, niter=power_iterations)
        right_KI = right_IK.T
    root_R = (values_K[:rank] / scaling).sqrt()
    return root_R[:, None] * right_KI[:rank], left_OK[:, :rank] * root_R


def qr(weight_OI: Tensor, rank: int, scaling: float) -> Factors:
    """Return the first columns of the QR decomposition of the weight.

    Source: OLoRA, Büyükakyüz 2024, arXiv:2406.01775.
    """
    columns_OK, rows_KI = torch.linalg.qr(weight_OI)
    return rows_KI[:rank].contiguous(), columns_OK[:, :rank].contiguous()


INITS: dict[str, Callable[[Tensor, int, float], Factors]] = {
    "orthogonal": orthogonal,
    "pissa": principal,
    "pissa_niter_16": partial(principal, power_iterations=16),
    "olora": qr,
    "loftq": principal,  # of the quantization error: LoftQ, Li et al. 2023, arXiv:2310.08659, one iteration
}


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield every adapted layer with its name in the base model."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@torch.no_grad()
def initialize(model: PeftModel, init: str, original: Callable[[str], Tensor]) -> None:
    """Set the initial factors of every adapter; subtract them from the base if the init requires it.

    init: a key of INITS. original: reads the 16-bit weight of a module by its full name (LoftQ).
    """
    for name, layer in lora_layers(model):
        base, scaling = cast(nn.Linear, layer.get_base_layer()), layer.scaling[ADAPTER]
        weight_OI = _starting_point(base, init, lambda name=name: original(name))
        if weight_OI is None:
            continue
        lora_A, lora_B = INITS[init](weight_OI, layer.r[ADAPTER], scaling)
        _weight(layer.lora_A).copy_(lora_A)
        _weight(layer.lora_B).copy_(lora_B)
        if init in CHANGES_BASE:
            base.weight.copy_(weight_OI - scaling * (lora_B @ lora_A))
    if init in CHANGES_BASE:
        # On the original base, the update is the difference to this start: see files.file_tensors.
        vars(model)["initial_factors"] = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if name.endswith((f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight"))
        }


def freeze_a(model: PeftModel) -> None:
    """Freeze A of every adapter, so that B alone is trained.

    PEFT makes every factor trainable again when it switches an adapter on, except those that it knows as frozen.
    Source: FFA-LoRA, Sun et al. 2024, arXiv:2403.12313.
    """
    for _, layer in lora_layers(model):
        layer.frozen_peft_weight_names = {ADAPTER: ("lora_A",)}
        _weight(layer.lora_A).requires_grad_(False)


def initial_factors(model: PeftModel) -> dict[str, Tensor]:
    """Return the initial factors of a PiSSA or OLoRA adapter by parameter name; empty for other inits."""
    return vars(model).get("initial_factors", {})


def _weight(factors: nn.ModuleDict) -> Tensor:
    return cast(nn.Linear, factors[ADAPTER]).weight


def _starting_point(base: nn.Linear, init: str, original: Callable[[], Tensor]) -> Tensor | None:
    """Return the fp32 matrix [out, in] to decompose: the weight, its shape only, or the quantization error."""
    if init == "orthogonal":
        return torch.empty(base.out_features, base.in_features, device="meta")
    if init != "loftq":
        return base.weight.float()
    if not isinstance(base, bnb.nn.Linear4bit):
        return None  # stored in 16 bit: no quantization error
    weight = cast(bnb.nn.Params4bit, base.weight)
    stored_OI = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return original().to(stored_OI.device, torch.float32) - stored_OI.float()


@torch.no_grad()
def measure_magnitudes(model: PeftModel) -> None:
    """Set DoRA's magnitudes to the fp32 norms of the current weights.

    PEFT computes them before the inits above and rounds them to the base's dtype, so a new adapter would already
    change the model.
    """
    for _, layer in lora_layers(model):
        cast(DoraLinearLayer, layer.lora_magnitude_vector[ADAPTER]).update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=_weight(layer.lora_A),
            lora_B=_weight(layer.lora_B),
            scaling=layer.scaling[ADAPTER],
        )
