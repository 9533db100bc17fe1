"""format=gguf: a Qwen2 model folder as one GGUF file, for llama.cpp, Ollama, LM Studio and others."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from finetune.export.exporter import Exported, ExportRequest, Log
from finetune.export.gguf.adapter import adapter_to_gguf
from finetune.export.gguf.check import check_model
from finetune.export.gguf.file import (
    PlannedTensor,
    check_file,
    file_name,
    final_folder,
    model_name,
    types_used,
    write_file,
)
from finetune.export.gguf.names import ARCHITECTURE, EMBEDDING, HEAD, check_tensors, settings, tensor_names
from finetune.export.gguf.tokenizer import Vocabulary, read_vocabulary
from finetune.export.gguf.types import DEFAULT, NumberType, fitting_type, gguf_package, number_type
from finetune.models.hub import weight_files
from finetune.models.safetensors_index import Stored, WeightFiles, read_rows
from finetune.system.errors import IntegrityError


def to_gguf(request: ExportRequest) -> Exported:
    """Writes `<name>-<type>.gguf` into job.out: the model, or with `merge=false` the adapter.

    `options.type`: one of types.TYPES, q8_0 if none is given: half of bf16's size, and hardly another answer.
    tq1_0 and tq2_0 keep three values a number, which only models survive that were trained so.
    Raises: MissingExtra without the gguf package; ConfigError for a type, tokenizer or model that GGUF cannot say;
    IntegrityError for NaN, for weights that are not Qwen2's, and where what was written does not compute what its
    source does.
    """
    gguf_package()  # before an hour's work, if it is missing
    if not request.options.merge:
        return adapter_to_gguf(request)
    kind = number_type(request.options.type or DEFAULT)
    path = request.out / file_name(request, kind)
    notes = write_model(request, path, kind)
    checks = check_model(request, path, kind) if request.options.verify else []
    final = shlex.quote(str(final_folder(request) / path.name))
    return Exported(checks, [f"llama-server -m {final}", f"llama-cli -m {final} -cnv"], notes)


def write_model(request: ExportRequest, path: Path, kind: NumberType) -> dict[str, Any]:
    """Writes the file and, with `verify`, proves its content.

    Returns: facts for the report. Raises: as `to_gguf`.
    """
    config = AutoConfig.from_pretrained(request.source, trust_remote_code=False, local_files_only=True)
    tensors = plan_tensors(request.source, config.num_hidden_layers, config.tie_word_embeddings, kind)
    vocabulary = read_vocabulary(request.source, tensors[0].shape[0])
    writer = gguf_package().GGUFWriter(None, ARCHITECTURE)
    _describe(writer, model_name(request), kind, tensors)
    for key, value in settings(config).items():
        _add(writer, f"{ARCHITECTURE}.{key}", value)
    writer.add_vocab_size(len(vocabulary.tokens))
    vocabulary.write(writer)
    entries = write_file(path, writer, tensors)
    if request.options.verify:
        check_file(path, entries, tensors)
    return _notes(request.log, path, kind, tensors, vocabulary)


def plan_tensors(folder: Path, layers: int, tied: bool, kind: NumberType) -> list[PlannedTensor]:
    """What the file will hold, in its order; the embedding is first. Reads headers alone.

    Raises: IntegrityError unless the folder holds exactly Qwen2's tensors.
    """
    stored = WeightFiles(weight_files(folder, str(folder))).tensors
    names = tensor_names(layers, tied)
    check_tensors(stored, names, str(folder))
    planned = [_planned(theirs, ours, stored[ours], kind) for ours, theirs in names.items()]
    if tied and "lm_head.weight" in stored:
        _check_tied(planned[0], stored["lm_head.weight"])
    return planned


def _planned(name: str, source: str, stored: Stored, kind: NumberType) -> PlannedTensor:
    fitting = fitting_type(kind, stored.shape, vocabulary=name in (EMBEDDING, HEAD))
    return PlannedTensor(name, source, stored.shape, fitting, lambda start, stop: read_rows(stored, start, stop))


def _check_tied(embedding: PlannedTensor, head: Stored) -> None:
    same = head.shape == embedding.shape and all(
        torch.equal(embedding.rows(*rows), read_rows(head, *rows)) for rows in embedding.chunks()
    )
    if not same:
        raise IntegrityError(
            f"{head.file} holds an lm_head.weight of its own, while config.json ties it to the embedding "
            "(tie_word_embeddings); correct one of them"
        )


def _describe(writer: Any, name: str, kind: NumberType, tensors: list[PlannedTensor]) -> None:
    gguf = gguf_package()
    total = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(total, total, 0, 0))
    writer.add_file_type(gguf.LlamaFileType[kind.file_type or f"MOSTLY_{kind.name.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add(writer: Any, key: str, value: int | float | str) -> None:
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
    add(key, value)


def _notes(
    log: Log, path: Path, kind: NumberType, tensors: list[PlannedTensor], vocabulary: Vocabulary
) -> dict[str, Any]:
    size = path.stat().st_size
    wider = [tensor.name for tensor in tensors if len(tensor.shape) > 1 and tensor.kind != kind]
    used = types_used(tensors)
    log(f"{path.name}: {size / 1e6:,.1f} MB, " + ", ".join(f"{count} tensors {name}" for name, count in used.items()))
    if wider:
        shown = ", ".join(wider[:5]) + (", …" if len(wider) > 5 else "")
        log(f"{len(wider)} matrices are wider than {kind.name} (vocabulary, or rows without whole blocks): {shown}")
    return {
        "file": path.name,
        "bytes": size,
        "type": kind.name,
        "tensors": used,
        "wider": wider,
        "tokens": len(vocabulary.tokens),
        "unused_tokens": vocabulary.kinds.count(5),
    }
