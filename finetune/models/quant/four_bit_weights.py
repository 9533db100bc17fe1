"""Quantize single weights of a model without loading the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.quant.cache import Log
from finetune.models.quant.eight_bit import dequantize_rows, eight_bit_modules, quantize_rows
from finetune.models.quant.four_bit import (
    build_skeleton,
    cache_of,
    quantize,
    quantized_modules,
    quantizing_workers,
    replace_linears,
)
from finetune.models.quant.quantize import storage_in
from finetune.ops.dequantize import dequantized_values

# Rows `start` to `stop` of a weight, fp32 on the CPU.
Rows = Callable[[int, int], Tensor]


class QuantizedWeights:
    """The 4-bit or 8-bit weights of a model: from the cache of training, else quantized when needed.

    Both give the same bits: the cache key covers everything that determines them.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Path],
        *,
        model: ModelConfig,
        quant: QuantConfig,
        settings: BitsAndBytesConfig,
        device: torch.device,
        log: Log,
    ):
        """Read the cache entry, if there is one.

        folder, files: of the 16-bit model. settings: from `load.quantization_of`. log: as for `load_base`.
        """
        skeleton = build_skeleton(folder, getattr(torch, model.dtype), "eager")
        storage = storage_in(skeleton, quant)
        replace_linears(skeleton, settings, storage, device)
        self._like = {f"{name}.weight": module.weight for name, module in quantized_modules(skeleton)}
        self._eight_bit = {f"{name}.weight" for name, _ in eight_bit_modules(skeleton)}
        self._device = device
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._computed_in: torch.dtype = getattr(torch, quant.compute_dtype)
        self._cached: dict[str, dict[str, Tensor]] = {}
        cache = cache_of(files, model, quant, storage, device, log=log)
        for name, tensor in ((cache.find() if cache is not None else None) or {}).items():
            owner, _, key = name.partition(".weight")
            self._cached.setdefault(f"{owner}.weight", {})[key.removeprefix(".")] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._like or name in self._eight_bit

    @property
    def names(self) -> set[str]:
        """Names of the quantized weights."""
        return self._eight_bit | set(self._like)

    def row_unit(self, name: str, width: int) -> int:
        """Return the number of rows [out] of `width` values after which a quantization block always ends."""
        if name in self._eight_bit:
            return 1
        block = self._like[name].blocksize
        return block // math.gcd(block, width)

    def dequantized(self, name: str, original: Callable[[], Tensor]) -> Rows:
        """Return a function (start, stop) -> rows of the weight as training computes with it, fp32 on the CPU.

        start must be a multiple of `row_unit`. A cached weight can be read once: its pages are freed then.
        original: reads the 16-bit weight [out, in] if needed.
        """
        if name in self._eight_bit:
            codes, largest = self._eight_bit_form(name, original)
            return lambda start, stop: (
                dequantize_rows(codes[start:stop], largest[start:stop], self._dtype).float().cpu()
            )
        return _four_bit_rows(*self._four_bit_form(name, original), self._computed_in)

    def _eight_bit_form(self, name: str, original: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        if parts := self._cached.pop(name, None):
            return parts[""].to(self._device), parts["SCB"].to(self._device)
        with quantizing_workers() as workers:
            return quantize_rows(original().to(device=self._device, dtype=self._dtype), workers.map)

    def _four_bit_form(self, name: str, original: Callable[[], Tensor]) -> tuple[Tensor, Any]:
        """Return a weight packed as uint8 [n, 1], and its QuantState."""
        from bitsandbytes.functional import QuantState

        if parts := self._cached.pop(name, None):
            packed = parts.pop("")
            return packed.to(self._device), QuantState.from_dict(parts, self._device)
        weight = original().to(device=self._device, dtype=self._dtype)
        with quantizing_workers() as workers:
            return quantize(weight, self._like[name], workers.map)


def _four_bit_rows(packed: Tensor, state: Any, computed_in: torch.dtype) -> Rows:
    width, values = state.shape[1], dequantized_values(packed, state, computed_in)
    return lambda start, stop: values(start * width, stop * width).view(-1, width).float().cpu()
