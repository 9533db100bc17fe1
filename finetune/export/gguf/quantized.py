"""GGUF types that llama.cpp's quantizer rounds to, with an importance matrix if the user names rows for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.config.compose import saved_config
from finetune.config.schema import ModelConfig, QuantConfig, SourceConfig
from finetune.data.documents import Document
from finetune.data.loader import load_data
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.evaluation.scoring import agreement
from finetune.export.exporter import ExportRequest
from finetune.export.gguf.check import load_gguf
from finetune.export.gguf.file import check_rounded, model_name
from finetune.export.gguf.imatrix import importance_matrix
from finetune.export.gguf.quantizer import QUANTIZER_TYPES, quantize_file
from finetune.export.gguf.types import gguf_package
from finetune.export.merge.kl_check import Recorded, data_section, held_out_section, load_examples, outputs_of
from finetune.export.verify import open_tokenizer
from finetune.losses.distillation import TeacherHidden
from finetune.models.adapters.files import fetch_adapter
from finetune.models.load import default_device, load_base
from finetune.ops.limits import EVALUATION_TOKENS
from finetune.system.errors import ConfigError, DataError
from finetune.system.format import format_bytes

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


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples that the importance matrix has not seen, and the model's outputs on them."""

    source: str
    documents: Sequence[Document]
    outputs: list[TeacherHidden]
    vocabulary: int

    def compare(self, path: Path, request: ExportRequest, imatrix: bool) -> TypeKl:
        """Measure a GGUF file that was written from `request.source`."""
        file = load_gguf(path, request.source).to(default_device())
        teacher = Recorded(iter(self.outputs))
        found = agreement(file, teacher, self.documents, self.vocabulary, limit_tokens=EVALUATION_TOKENS)
        return TypeKl(request.kind, imatrix, found.kl, found.top1, found.tokens, len(self.documents), self.source)


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
    imatrix, held_out = None, None
    if options.imatrix is not None:
        imatrix = plain.with_name(IMATRIX_FILE)
        held_out = _measure_inputs(request, options.imatrix, imatrix)
    table = []
    if held_out is not None and not QUANTIZER_TYPES[kind]:
        unweighted = plain.with_name("unweighted.gguf")
        quantize_file(plain, unweighted, kind, None)
        table.append(held_out.compare(unweighted, request, imatrix=False))
        unweighted.unlink()
    quantize_file(plain, path, kind, imatrix)
    if options.verify:
        check_rounded(path, plain)
    if held_out is not None:
        table.append(held_out.compare(path, request, imatrix=True))
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
    types = Counter(stored for _, stored, _ in matrices)
    counts = ", ".join(f"{name}={count}" for name, count in types.items())
    size = path.stat().st_size
    request.log(f"gguf: file={path.name}, size={format_bytes(size)}, matrices: {counts}")
    unfilled = [found for found in matrices if found[2] % _BLOCK and found[1] != request.kind]
    if unfilled:
        widths = ", ".join(str(width) for width in sorted({width for _, _, width in unfilled}))
        others = ", ".join(sorted({stored for _, stored, _ in unfilled}))
        request.log(
            f"gguf: {len(unfilled)} of {len(matrices)} matrices are {others} instead: blocks of {_BLOCK} do not fill "
            f"their rows of {widths}"
        )
    return {
        "file": path.name,
        "bytes": size,
        "type": request.kind,
        "tensors": dict(types),
        "wider": [name for name, _, _ in unfilled],
    }


def _measure_inputs(request: ExportRequest, sources: list[SourceConfig], path: Path) -> HeldOut | None:
    """Write the importance matrix of the rows; return the held-out examples, or None if there are none or no check."""
    options = request.options
    cfg = None if options.adapter is None else saved_config(fetch_adapter(options.adapter, "adapter").folder)
    tokenizer = open_tokenizer(request.source)
    try:
        rows = load_data(Preparation(data_section(cfg, sources), ChatTemplate(tokenizer)))
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
    source = load_examples(section, tokenizer, f"model={options.adapter or options.model}")
    seen = {document.ids.tobytes() for document in rows.documents}
    unseen = [document for document in source.documents if document.ids.tobytes() not in seen]
    documents = unseen[: options.kl_check.num_examples]
    if not documents:
        request.log(f"kl_check: skipped, imatrix has all examples of {source.name}")
        return None
    return HeldOut(source.name, documents, outputs_of(model, documents), len(tokenizer))
