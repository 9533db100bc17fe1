"""Quantize single weights of a model without loading the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.quant.cache import Log
from finetune.models.quant.eight_bit import dequantize_rows, quantize_rows
from finetune.models.quant.four_bit import cache_of, quantize, quantizing_workers, replace_linears
from finetune.models.quant.quantize import quantized_layers, storage_in
from finetune.models.skeleton import build_skeleton
from finetune.ops.dequantize import dequantized_values

# Rows `start` to `stop` of a weight, fp32 on the CPU.
Rows = Callable[[int, int], Tensor]


class QuantizedWeights:
    """The 4-bit or 8-bit weights of a model, by name: from the cache of training, else quantized when needed.

    Both give the same bits: the cache key covers everything that determines them.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Path],
        *,
        model: ModelConfig,
        quant: QuantConfig,
        device: torch.device,
        log: Log,
    ):
        """Read the cache entry, if there is one. folder, files: of the 16-bit model. log: as for `load_base`."""
        skeleton = build_skeleton(folder, getattr(torch, model.dtype), "eager")
        storage = storage_in(skeleton, quant)
        replace_linears(skeleton, quant, storage, device)
        self._like = {f"{name}.weight": module.weight for name, module in quantized_layers(skeleton, "nf4")}
        self._eight_bit = {f"{name}.weight" for name, _ in quantized_layers(skeleton, "int8")}
        self.names = self._eight_bit | set(self._like)
        self._device = device
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._computed_in: torch.dtype = getattr(torch, quant.compute_dtype)
        cache = cache_of(files.values(), model, quant, storage, device, log=log)
        cached = (cache.find() if cache is not None else None) or {}
        self._cached = {f"{layer}.weight": parts for layer, parts in cached.items()}

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
        from bitsandbytes.functional import QuantState

        parts, is_int8 = self._cached.pop(name, None), name in self._eight_bit
        scales: Any  # int8: the absolute maximum of each row; else a QuantState
        if parts is None:
            weight = original().to(device=self._device, dtype=self._dtype)
            with quantizing_workers() as workers:
                if is_int8:
                    codes, scales = quantize_rows(weight, workers.map)
                else:
                    codes, scales = quantize(weight, self._like[name], workers.map)
        else:
            codes = parts.pop("").to(self._device)
            scales = parts["SCB"].to(self._device) if is_int8 else QuantState.from_dict(parts, self._device)
        if is_int8:
            return lambda start, stop: dequantize_rows(codes[start:stop], scales[start:stop], self._dtype).float().cpu()
        width, values = scales.shape[1], dequantized_values(codes, scales, self._computed_in)
        return lambda start, stop: values(start * width, stop * width).view(-1, width).float().cpu()
