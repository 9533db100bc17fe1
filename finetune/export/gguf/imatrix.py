"""The importance matrix of llama.cpp: how strongly each input channel of a linear layer is used on some rows.

For each weight it holds the sum over tokens of the squared inputs [C], and the number of tokens. The quantizer weights
the error of a column with their quotient. As with `llama-imatrix`, the embedding and the head have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.batch import build_batch, groups_of
from finetune.data.documents import Document
from finetune.export.gguf.qwen2 import ARCHITECTURE, linear_name
from finetune.export.gguf.types import gguf_package
from finetune.losses.hidden_states import target_states
from finetune.ops.limits import EVALUATION_TOKENS


@dataclass(frozen=True)
class ImportanceMatrix:
    """sums: fp64 sum of the squared inputs [C] of each tensor of the file. tokens: number of tokens summed."""

    sums: dict[str, Tensor]
    tokens: int

    def write(self, path: Path, dataset: str) -> None:
        """Write llama.cpp's GGUF format. dataset: name of the rows in the file."""
        writer: Any = gguf_package().GGUFWriter(None, ARCHITECTURE)
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", 1)
        writer.add_uint32("imatrix.chunk_size", self.tokens)
        for name, sums in sorted(self.sums.items()):
            writer.add_tensor(f"{name}.in_sum2", sums.float().numpy()[None])
            writer.add_tensor(f"{name}.counts", torch.tensor([[float(self.tokens)]]).numpy())
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@torch.no_grad()
def importance_matrix(model: nn.Module, documents: Iterable[Document]) -> ImportanceMatrix:
    """Sum the squared inputs of a Qwen2's linear layers over all tokens of documents; its attention has no padding."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        squares = inputs.flatten(0, -2).double().square().sum(0)
        sums[name] = squares + sums[name] if name in sums else squares

    linears = [(found, module) for name, module in model.named_modules() if (found := linear_name(name))]
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0])) for name, module in linears
    ]
    tokens = 0
    try:
        for group in groups_of(documents, EVALUATION_TOKENS):
            target_states(model, build_batch(group))
            tokens += sum(map(len, group))
    finally:
        for hook in hooks:
            hook.remove()
    return ImportanceMatrix({name: total.cpu() for name, total in sums.items()}, tokens)
