"""The 4-bit form of one weight at a time, without a model around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.four_bit import (
    build_skeleton,
    cache_of,
    give_four_bit_layers,
    quantise,
    quantised_modules,
    quantising_workers,
)
from finetune.models.quantised_cache import Say


class FourBitWeights:
    """What a model's weights are in 4 bit: as training left them in its cache, else quantised when they are asked for.

    Both are the same bits: the cache is found by all that decides them.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Path],
        model: ModelConfig,
        quant: QuantConfig,
        settings: BitsAndBytesConfig,
        device: torch.device,
        say: Say,
    ):
        """folder, files: of the 16-bit model. settings: from `load.quantisation_of`. say: as for `load_base`."""
        skeleton = build_skeleton(folder, getattr(torch, model.dtype), "eager")
        give_four_bit_layers(skeleton, settings, device)
        self._like = {f"{name}.weight": module.weight for name, module in quantised_modules(skeleton)}
        self._device = device
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._cached: dict[str, dict[str, Tensor]] = {}
        cache = cache_of(files, model, quant, settings, device, say)
        for name, tensor in ((cache.find() if cache is not None else None) or {}).items():
            owner, _, key = name.partition(".weight")
            self._cached.setdefault(f"{owner}.weight", {})[key.removeprefix(".")] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._like

    @property
    def names(self) -> set[str]:
        """Of the weights that are in 4 bit."""
        return set(self._like)

    def block_size(self, name: str) -> int:
        """Numbers that share a scale."""
        return self._like[name].blocksize

    def take(self, name: str, original: Callable[[], Tensor]) -> tuple[Tensor, Any]:
        """A weight packed as uint8 [n, 1], and bitsandbytes' state of it.

        original: reads it in 16 bit [out, in], if it has to be. A weight is cheap once: its pages are let go of then.
        """
        from bitsandbytes.functional import QuantState

        if parts := self._cached.pop(name, None):
            packed = parts.pop("")
            return packed.to(self._device), QuantState.from_dict(parts, self._device)
        weight = original().to(device=self._device, dtype=self._dtype)
        with quantising_workers() as workers:
            return quantise(weight, self._like[name], workers.map)
