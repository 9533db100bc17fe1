"""GGUF types that llama.cpp's quantizer rounds to, with an importance matrix if the user names rows for it.

The matrix holds, for each weight, the sum over tokens of the squared inputs [C], and the number of tokens. The
quantizer weights the error of a column with their quotient. As with `llama-imatrix`, the embedding and the head have
none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune.config.compose import saved_config
from finetune.config.schema import ModelConfig, QuantConfig, SourceConfig
from finetune.data.batch import build_batch, groups_of
from finetune.data.documents import Document
from finetune.data.loader import load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.evaluation.examples import read_for_scoring
from finetune.export.exporter import ExportRequest
from finetune.export.gguf.architecture import gguf_of, linear_name
from finetune.export.gguf.check import load_gguf
from finetune.export.gguf.file import check_rounded, describe_file, model_name
from finetune.export.gguf.quantizer import QUANTIZER_TYPES, quantize_file
from finetune.export.gguf.types import gguf_package
from finetune.export.merge.kl_check import (
    HeldOutSet,
    Reference,
    data_section,
    held_out_section,
    load_examples,
    outputs_of,
)
from finetune.export.verify import open_tokenizer
from finetune.losses.hidden_states import target_states
from finetune.models.adapters.files import fetch_adapter
from finetune.models.families import family_of
from finetune.models.load import load_base
from finetune.ops.limits import EVALUATION_TOKENS
from finetune.system.accelerator import default_device
from finetune.system.errors import ConfigError, DataError


@dataclass(frozen=True)
class ImportanceMatrix:
    """sums: fp64 sum of the squared inputs [C] of each tensor of the file. tokens: number of tokens summed.

    architecture: of the model, by its name in GGUF.
    """

    sums: dict[str, Tensor]
    tokens: int
    architecture: str

    def write(self, path: Path, dataset: str) -> None:
        """Write llama.cpp's GGUF format. dataset: name of the rows in the file."""
        writer: Any = gguf_package().GGUFWriter(None, self.architecture)
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
def importance_matrix(model: PreTrainedModel, documents: Iterable[Document]) -> ImportanceMatrix:
    """Sum the squared inputs of a decoder's linears over all tokens of documents; its attention has no padding."""
    family = family_of(model.config.model_type, "the model")
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        squares = inputs.flatten(0, -2).double().square().sum(0)
        sums[name] = squares + sums[name] if name in sums else squares

    linears = [(found, module) for name, module in model.named_modules() if (found := linear_name(family, name))]
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=f"{name}.weight": add(name, inputs[0]))
        for name, module in linears
    ]
    tokens = 0
    try:
        for group in groups_of(documents, EVALUATION_TOKENS):
            target_states(model, build_batch(group))
            tokens += sum(map(len, group))
    finally:
        for hook in hooks:
            hook.remove()
    return ImportanceMatrix({name: total.cpu() for name, total in sums.items()}, tokens, gguf_of(family).architecture)


IMATRIX_FILE = "imatrix.gguf"
_BLOCK = 256  # values that share scales in k- and i-types


@dataclass(frozen=True)
class TypeKl:
    """The distance of a GGUF file from the model in fp32: KL in nats per target token, share of equal top tokens."""

    type: str
    imatrix: bool
    kl: float
    top1: float
    tokens: int
    rows: int
    source: str

    def describe(self) -> str:
        return (
            f"kl_check: type={self.type}, imatrix={'yes' if self.imatrix else 'no'}, KL(model || file)={self.kl:.6f} "
            f"nats per token, same top token={self.top1:.2%}, targets={self.tokens:,}, examples={self.rows}, "
            f"source={self.source}"
        )


def _compare(path: Path, request: ExportRequest, reference: Reference, imatrix: bool) -> TypeKl:
    """Measure a GGUF file that was written from `request.source`."""
    held_out = reference.held_out
    found = reference.agreement(load_gguf(path, request.source).to(default_device()))
    return TypeKl(request.kind, imatrix, found.kl, found.top1, found.tokens, len(held_out.documents), held_out.source)


def quantize(request: ExportRequest, plain: Path) -> tuple[Path, dict[str, Any]]:
    """Replace the f32 file `plain` by `NAME-TYPE.gguf`, and verify it if `options.verify`.

    Returns:
        The file, and facts for the report.

    Raises:
        ConfigError: the rows of `options.imatrix` cannot be read.
        FinetuneError: the quantizer failed.
        IntegrityError: the file does not hold the model.
    """
    kind, options = request.kind, request.options
    path = plain.with_name(f"{model_name(request)}-{kind}.gguf")
    imatrix, reference = None, None
    if options.imatrix is not None:
        imatrix = plain.with_name(IMATRIX_FILE)
        reference = _measure_inputs(request, options.imatrix, imatrix)
    table = []
    if reference is not None and not QUANTIZER_TYPES[kind]:
        unweighted = plain.with_name("unweighted.gguf")
        quantize_file(plain, unweighted, kind, None)
        table.append(_compare(unweighted, request, reference, imatrix=False))
        unweighted.unlink()
    quantize_file(plain, path, kind, imatrix)
    if options.verify:
        check_rounded(path, plain)
    if reference is not None:
        table.append(_compare(path, request, reference, imatrix=True))
    plain.unlink()
    notes = _describe(request, path)
    for row in table:
        request.log(row.describe())
    return path, notes | {"imatrix_kl": [asdict(row) for row in table]}


def _describe(request: ExportRequest, path: Path) -> dict[str, Any]:
    """Log the stored types, and the tensors whose rows the blocks of the type do not fill; return the facts."""
    matrices = [
        (tensor.name, tensor.tensor_type.name.lower(), int(tensor.shape[0]))
        for tensor in gguf_package().GGUFReader(path).tensors
        if len(tensor.shape) > 1
    ]
    facts = describe_file(request, path, [stored for _, stored, _ in matrices])
    unfilled = [found for found in matrices if found[2] % _BLOCK and found[1] != request.kind]
    if unfilled:
        widths = ", ".join(str(width) for width in sorted({width for _, _, width in unfilled}))
        others = ", ".join(sorted({stored for _, stored, _ in unfilled}))
        request.log(
            f"gguf: {len(unfilled)} of {len(matrices)} matrices are {others} instead: blocks of {_BLOCK} do not fill "
            f"their rows of {widths}"
        )
    return facts | {"wider": [name for name, _, _ in unfilled]}


def _measure_inputs(request: ExportRequest, sources: list[SourceConfig], path: Path) -> Reference | None:
    """Write the importance matrix of the rows; return the model's outputs on held-out examples that it has not seen.

    None without a check or such examples.
    """
    options = request.options
    cfg = None if options.adapter is None else saved_config(fetch_adapter(options.adapter, "adapter").folder)
    tokenizer = open_tokenizer(request.source)
    try:
        rows = load_data(
            Preparation(data_section(cfg, sources), ChatTemplate(tokenizer), objective=read_for_scoring(cfg)[0])
        )
    except DataError as error:
        raise ConfigError(str(error).replace("data.train[", "imatrix[")) from error
    # Segmented attention pads rows, and padding is no input.
    base = ModelConfig(name=str(request.source), dtype="float32", attention="sdpa")
    model = load_base(base, QuantConfig(type="none", double=False), default_device())
    found = importance_matrix(model, rows.documents)
    found.write(path, ", ".join(source.name for source in rows.train))
    request.log(f"imatrix: file={path.name}, examples={len(rows.documents):,}, tokens={found.tokens:,}")
    section = held_out_section(cfg, options.kl_check) if options.verify else None
    if section is None:
        if options.verify:
            request.log("kl_check: skipped, no held-out examples; pass 'kl_check.data=[{path: rows.jsonl}]'")
        return None
    source = load_examples(section, tokenizer, f"model={options.adapter or options.model}", cfg)
    seen = {document.ids.tobytes() for document in rows.documents}
    unseen = [document for document in source.documents if document.ids.tobytes() not in seen]
    documents = unseen[: options.kl_check.num_examples]
    if not documents:
        request.log(f"kl_check: skipped, imatrix has all examples of {source.name}")
        return None
    return Reference(HeldOutSet(source.name, documents, len(tokenizer)), outputs_of(model, documents))
