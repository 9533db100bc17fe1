"""Batched generation with a key-value cache; a finished row leaves the batch.

Shapes: B prompts of a batch, N unfinished ones, L tokens so far with padding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from finetune.config.schema import QuantConfig
from finetune.losses.chunked import logits_of
from finetune.losses.cross_entropy import head_of
from finetune.losses.hidden_states import base_of
from finetune.models.quant.four_bit import keep_resident, resident_bytes
from finetune.system.machine import available_memory

# (logits [N, V], index of each row's prompt [N], number of tokens generated for it [N]) -> ids [N] int64.
Choose = Callable[[Tensor, list[int], list[int]], Tensor]


def greedy(logits_NV: Tensor, prompts: list[int], written: list[int]) -> Tensor:
    """Choose the most probable token of each row."""
    return logits_NV.argmax(-1)


def dequantize_once(model: nn.Module, quant: QuantConfig) -> None:
    """Also keep 4-bit weights in 16 bit on a CPU with enough memory, as `quant.keep_dequantized` does.

    Otherwise each token dequantizes all weights, which takes most of its time. A GPU's kernels read 4-bit weights.
    """
    if quant.type != "nf4" or quant.keep_dequantized or next(model.parameters()).device.type != "cpu":
        return
    # Leave half of the free memory to others.
    if 2 * resident_bytes(model) <= (available_memory() or 0):
        keep_resident(model)


class Decoding:
    """A batch of prompts, padded on the left, with its key-value cache.

    Use it in evaluation mode and under `torch.no_grad`.

    Args:
        prompts: ids, at least one each.
        limits: the most tokens to generate, per prompt.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[np.ndarray | list[int]], limits: Sequence[int]):
        base = base_of(model)
        self.head, self.backbone = head_of(model), getattr(base, base.base_model_prefix)
        self.device = next(model.parameters()).device
        self.cache = DynamicCache(config=base.config)
        self.limits = limits
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.open = list(range(len(prompts)))  # unfinished answers: the rows of all tensors
        longest = max(map(len, prompts))
        self.ids_NL = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        self.mask_NL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        self.positions_NL = (self.mask_NL.cumsum(1) - 1).clamp_(min=0)

    def write(self, choose: Choose, stop_ids: Collection[int], vocabulary: int) -> list[list[int]]:
        """Generate each answer up to one of `stop_ids` or its limit. vocabulary: V, number of ids to choose from."""
        while self.open:
            logits_NV = logits_of(self._read(), self.head, vocabulary)
            ids_N = choose(logits_NV, self.open, [len(self.answers[i]) for i in self.open])
            stays = []
            for i, token in zip(self.open, ids_N.tolist(), strict=True):
                self.answers[i].append(token)
                stays.append(token not in stop_ids and len(self.answers[i]) < self.limits[i])
            self._append(ids_N, stays)
        return self.answers

    def _read(self) -> Tensor:
        """Process the new tokens, and return the final hidden states [N, D] at the end of each row."""
        outputs = self.backbone(
            input_ids=self.ids_NL,
            attention_mask=self.mask_NL,
            position_ids=self.positions_NL,
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.last_hidden_state[:, -1]

    def _append(self, ids_N: Tensor, stays: list[bool]) -> None:
        mask_NL, positions_N1 = self.mask_NL, self.positions_NL[:, -1:] + 1
        if not all(stays):
            kept = torch.tensor([k for k, stay in enumerate(stays) if stay], dtype=torch.long, device=self.device)
            self.open = [i for i, stay in zip(self.open, stays, strict=True) if stay]
            self.cache.batch_select_indices(kept)
            ids_N, mask_NL, positions_N1 = ids_N[kept], mask_NL[kept], positions_N1[kept]
        self.ids_NL, self.positions_NL = ids_N[:, None], positions_N1
        self.mask_NL = torch.cat([mask_NL, mask_NL.new_ones(len(ids_N), 1)], 1)
