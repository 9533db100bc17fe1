"""format=gguf: a Qwen2 model folder as one GGUF file, for llama.cpp, Ollama, LM Studio and others."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from finetune.export.exporter import Exported, ExportRequest
from finetune.export.gguf.adapter import write_adapter
from finetune.export.gguf.check import check_model
from finetune.export.gguf.file import PlannedTensor, start_writer, write_file
from finetune.export.gguf.quantized import quantize
from finetune.export.gguf.quantizer import QUANTIZER_TYPES, find_quantizer
from finetune.export.gguf.qwen2 import (
    ARCHITECTURE,
    EMBEDDING,
    HEAD,
    UNUSED,
    check_tensors,
    read_vocabulary,
    settings,
    tensor_names,
)
from finetune.export.gguf.types import TYPES, NumberType, gguf_package, storage_type
from finetune.models.hub import weight_files
from finetune.models.safetensors_index import WeightFiles, read_rows
from finetune.system.errors import IntegrityError

_LISTED_TENSORS = 5


def check_libraries(kind: str) -> None:
    """Raise MissingExtra without the gguf package, or without the quantizer that writes this type."""
    gguf_package()
    if kind in QUANTIZER_TYPES:
        find_quantizer(kind, imatrix=False)


def write(request: ExportRequest) -> Exported:
    """Write `NAME-TYPE.gguf`: the model, or with `merge=false` the adapter.

    Raises:
        ConfigError: GGUF cannot represent the tokenizer, the model or the adapter.
        IntegrityError: the source is corrupt, or the file does not compute what its source computes.
        FinetuneError: llama.cpp's quantizer failed.
    """
    if not request.options.merge:
        return write_adapter(request)
    if request.kind in QUANTIZER_TYPES:
        full = replace(request, options=request.options.model_copy(update={"type": "f32"}), log=lambda text: None)
        plain, notes = _write_model(full)
        path, more = quantize(request, plain)
        notes |= more
    else:
        path, notes = _write_model(request)
    checks = check_model(request, path) if request.options.verify else []
    final = shlex.quote(str(request.final_folder / path.name))
    return Exported(checks, [f"llama-server -m {final}", f"llama-cli -m {final} -cnv"], notes)


def _write_model(request: ExportRequest) -> tuple[Path, dict[str, Any]]:
    """Write the model in a type of the gguf package; return the file and facts for the report."""
    kind = TYPES[request.kind]
    config = AutoConfig.from_pretrained(request.source, trust_remote_code=False, local_files_only=True)
    tensors = plan_tensors(request.source, config.num_hidden_layers, config.tie_word_embeddings, kind)
    vocabulary = read_vocabulary(request.source, tensors[0].shape[0])
    writer = start_writer(request, "model")
    total = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    writer.add_size_label(gguf_package().size_label(total, total, 0, 0))
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in settings(config).items():
        add[type(value)](f"{ARCHITECTURE}.{key}", value)
    writer.add_vocab_size(len(vocabulary.tokens))
    vocabulary.write(writer)
    path, notes = write_file(request, writer, tensors)
    wider = [tensor.name for tensor in tensors if len(tensor.shape) > 1 and tensor.kind != kind]
    if wider:
        shown = ", ".join(wider[:_LISTED_TENSORS]) + (", …" if len(wider) > _LISTED_TENSORS else "")
        request.log(f"gguf: wider than {kind.name} (vocabulary, or rows that blocks do not fill): {shown}")
    tokens, unused = len(vocabulary.tokens), vocabulary.kinds.count(UNUSED)
    return path, notes | {"wider": wider, "tokens": tokens, "unused_tokens": unused}


def plan_tensors(folder: Path, layers: int, tied: bool, kind: NumberType) -> list[PlannedTensor]:
    """List the tensors of the file in their order, the embedding first; only headers are read.

    Raises:
        IntegrityError: the folder does not hold exactly the tensors of Qwen2.
    """
    stored = WeightFiles(weight_files(folder, str(folder))).tensors
    names = tensor_names(layers, tied)
    check_tensors(stored, names, str(folder))
    planned = [
        PlannedTensor(
            theirs,
            ours,
            stored[ours].shape,
            storage_type(kind, stored[ours].shape, vocabulary=theirs in (EMBEDDING, HEAD)),
            partial(read_rows, stored[ours]),
        )
        for ours, theirs in names.items()
    ]
    if tied and (head := stored.get("lm_head.weight")):
        embedding = planned[0]
        same = head.shape == embedding.shape and all(
            torch.equal(embedding.rows(*rows), read_rows(head, *rows)) for rows in embedding.chunks()
        )
        if not same:
            raise IntegrityError(
                f"{head.file}: lm_head.weight differs from the embedding, but config.json has tie_word_embeddings\n"
                "help: correct one of them"
            )
    return planned
