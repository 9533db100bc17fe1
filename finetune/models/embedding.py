"""An input embedding in main memory: a GPU gets the rows of a batch's tokens alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.system.accelerator import on_gpu

# Pinned memory comes in powers of two, so copies of this size waste little of it.
_COPY_BYTES = 2**26


class HostEmbedding(nn.Module):
    """A frozen embedding whose rows are gathered on the CPU and copied to a device, which nothing waits for.

    weight: [V, D] in main memory. It is neither parameter nor buffer: nothing moves it to the device, and the first
    parameter of a model still names the model's device.
    """

    def __init__(self, weight_VD: Tensor, device: torch.device):
        super().__init__()
        self.weight = weight_VD.detach().to("cpu", copy=True)
        self.device = device

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [..., D] of ids [...], on the device. Pass ids on the CPU: those of a GPU are waited for."""
        width, pinned = self.weight.shape[1], on_gpu(self.device)
        rows_TD = self.weight.new_empty(ids.numel(), width, device=self.device)
        block = max(1, _COPY_BYTES // (width * self.weight.itemsize))
        for ids_B, rows_BD in zip(ids.cpu().flatten().split(block), rows_TD.split(block), strict=True):
            staged_BD = torch.empty(rows_BD.shape, dtype=self.weight.dtype, device="cpu", pin_memory=pinned)
            torch.index_select(self.weight, 0, ids_B, out=staged_BD)
            rows_BD.copy_(staged_BD, non_blocking=True)
        return rows_TD.view(*ids.shape, width)


def move_embedding_to_host(base: PreTrainedModel) -> None:
    """Replace the input embedding of a frozen base by one in main memory. Results stay the same in every bit."""
    embedding = base.get_input_embeddings()
    if not isinstance(embedding, HostEmbedding):
        base.set_input_embeddings(HostEmbedding(embedding.weight, base.device))  # type: ignore[arg-type]
