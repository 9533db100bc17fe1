"""format=gguf: one file for llama.cpp, Ollama, LM Studio and others.

It holds a model, or with merge=false a LoRA adapter, which llama.cpp adds to a base at run time.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from finetune.export.adapter_folder import merge_reasons
from finetune.export.exporter import Exported, ExportRequest
from finetune.export.gguf.architecture import (
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    check_tensors,
    gguf_of,
    head_dim_of,
    in_gguf,
    linear_name,
    rope_factors,
    settings,
    tensor_names,
)
from finetune.export.gguf.check import check_model
from finetune.export.gguf.file import PlannedTensor, start_writer, write_file
from finetune.export.gguf.quantized import quantize
from finetune.export.gguf.quantizer import QUANTIZER_TYPES, find_quantizer
from finetune.export.gguf.types import TYPES, NumberType, gguf_package, storage_type
from finetune.export.gguf.vocabulary import UNUSED, read_vocabulary
from finetune.models.adapters.files import SavedAdapter, fetch_adapter, scaling_of
from finetune.models.adapters.names import PREFIX
from finetune.models.families import ModelFamily, family_of, shape_of, text_settings
from finetune.models.families.known import complete_shape
from finetune.models.hub import find_texts, read_config, weight_files
from finetune.models.safetensors_index import WeightFiles, read_rows
from finetune.system.errors import ConfigError, IntegrityError


def write_adapter(request: ExportRequest) -> Exported:
    """Write `NAME-TYPE.gguf` from the PEFT adapter in `request.source`.

    f32 keeps every bit of an ordinary adapter. llama.cpp scales by alpha / rank. If PEFT scales otherwise (rsLoRA,
    alpha_pattern), the quotient is multiplied into B in fp32.

    Raises:
        ConfigError: lists everything of the adapter that the file cannot hold.
        IntegrityError: the adapter is corrupt, or the file was not written correctly.
    """
    adapter = fetch_adapter(str(request.source), "adapter")
    family, head_dim = _base_of(adapter, request)
    if problems := list(_obstacles(adapter, family)):
        listed = "\n  ".join(problems)
        raise ConfigError(f"adapter={adapter.name}: cannot be a GGUF adapter:\n  {listed}\nhelp: use merge=true")
    alpha = float(adapter.config.get("lora_alpha", 8)) or 1.0  # llama.cpp reads 0 as: do not scale.
    tensors = []
    for name_A, lora_A in adapter.tensors.items():
        if ".lora_A." not in name_A:
            continue
        module, name_B = _module(name_A), name_A.replace(".lora_A.", ".lora_B.")
        factor = scaling_of(adapter.config, module, len(lora_A)) * len(lora_A) / alpha
        lora_B = adapter.tensors[name_B]
        scaled_B = lora_B if factor == 1 else lora_B.float() * factor
        rows_B = in_gguf(family, module, partial(_rows, scaled_B), head_dim)
        for end, source, tensor, rows in (("a", name_A, lora_A, partial(_rows, lora_A)), ("b", name_B, lora_B, rows_B)):
            tensors.append(
                PlannedTensor(
                    f"{linear_name(family, module)}.weight.lora_{end}",
                    source,
                    tuple(tensor.shape),
                    storage_type(TYPES[request.kind], tuple(tensor.shape), vocabulary=False),
                    rows,
                )
            )
    writer = start_writer(request, "adapter", gguf_of(family).architecture)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if base := adapter.config.get("base_model_name_or_path"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, str(base).rstrip("/").rpartition("/")[2])
    path, notes = write_file(request, writer, tensors)
    final = shlex.quote(str(request.final_folder / path.name))
    return Exported([], [f"llama-server -m BASE.gguf --lora {final}"], {**notes, "alpha": alpha})


def _base_of(adapter: SavedAdapter, request: ExportRequest) -> tuple[ModelFamily, int]:
    """Return the family of an adapter's base, and the width of its heads; at most its text files are downloaded."""
    name = str(request.options.model or adapter.config.get("base_model_name_or_path") or "")
    if not name:
        raise ConfigError(f"adapter={adapter.name}: adapter_config.json names no base model\nhelp: pass model=NAME")
    if (shape := shape_of(name)) is None:
        revision = None if request.options.model else adapter.config.get("revision")
        shape = complete_shape(text_settings(read_config(find_texts(name, revision, "model").folder, name)))
    if shape is None:
        raise ConfigError(f"model={name}: its config.json has no shape of a decoder")
    return family_of(shape["model_type"], f"model={name}"), shape["head_dim"]


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def _module(name: str) -> str:
    return name.removeprefix(PREFIX).partition(".lora_")[0]


def _obstacles(adapter: SavedAdapter, family: ModelFamily) -> Iterator[str]:
    """Yield the reasons why a GGUF file cannot hold the adapter."""
    yield from merge_reasons(adapter.config)
    other = {
        _module(name)
        for name in adapter.tensors
        if not name.endswith((".lora_A.weight", ".lora_B.weight")) or linear_name(family, _module(name)) is None
    }
    if other:
        shown = ", ".join(sorted(other)[:5]) + (", …" if len(other) > 5 else "")
        yield f"tensors that are not LoRA of a linear layer in a block: {shown}"


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
    family = family_of(config.model_type, "config.json")
    architecture, entries = gguf_of(family).architecture, settings(family, config)
    tensors = plan_tensors(request.source, family, config, kind)
    vocabulary = read_vocabulary(family, request.source, tensors[0].shape[0])
    writer = start_writer(request, "model", architecture)
    total = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    writer.add_size_label(gguf_package().size_label(total, total, 0, 0))
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in entries.items():
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_vocab_size(len(vocabulary.tokens))
    vocabulary.write(writer)
    path, notes = write_file(request, writer, tensors)
    wider = [tensor.name for tensor in tensors if len(tensor.shape) > 1 and tensor.kind != kind]
    if wider:
        shown = ", ".join(wider[:_LISTED_TENSORS]) + (", …" if len(wider) > _LISTED_TENSORS else "")
        request.log(f"gguf: wider than {kind.name} (vocabulary, or rows that blocks do not fill): {shown}")
    tokens, unused = len(vocabulary.tokens), vocabulary.kinds.count(UNUSED)
    return path, notes | {"wider": wider, "tokens": tokens, "unused_tokens": unused}


def plan_tensors(folder: Path, family: ModelFamily, config: Any, kind: NumberType) -> list[PlannedTensor]:
    """List the tensors of the file in their order, the embedding first; only headers are read.

    Args:
        config: transformers' config of the folder.
        kind: of the matrices.

    Raises:
        IntegrityError: the folder does not hold exactly the tensors of the family.
    """
    stored = WeightFiles(weight_files(folder, str(folder))).tensors
    names = tensor_names(family, config.num_hidden_layers, config.tie_word_embeddings)
    check_tensors(family, stored, names, str(folder))
    head_dim = head_dim_of(config)
    planned = [
        PlannedTensor(
            theirs,
            ours,
            stored[ours].shape,
            storage_type(kind, stored[ours].shape, vocabulary=theirs in (EMBEDDING, HEAD)),
            in_gguf(family, ours, partial(read_rows, stored[ours]), head_dim),
        )
        for ours, theirs in names.items()
    ]
    if config.tie_word_embeddings and (head := stored.get(f"{family.head}.weight")):
        embedding = planned[0]
        same = head.shape == embedding.shape and all(
            torch.equal(embedding.rows(*rows), read_rows(head, *rows)) for rows in embedding.chunks()
        )
        if not same:
            raise IntegrityError(
                f"{head.file}: {family.head}.weight differs from the embedding, but config.json has "
                "tie_word_embeddings\nhelp: correct one of them"
            )
    if (factors := rope_factors(config)) is not None:
        rows = partial(_rows, factors)
        planned.append(PlannedTensor(ROPE_FACTORS, "rope_parameters", tuple(factors.shape), TYPES["f32"], rows))
    return planned
