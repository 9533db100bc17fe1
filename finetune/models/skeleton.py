"""A model of a config.json with shapes and without storage, and how it gets its plain tensors from their files."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from finetune.config.schema import ModelConfig
from finetune.models.families import ModelFamily, family_of
from finetune.models.hub import TensorFile
from finetune.models.quant.quantize import quantized_layers
from finetune.models.safetensors_header import read_header
from finetune.models.safetensors_index import read_tensor
from finetune.system.errors import ConfigError, FinetuneError

# Smaller tensors are copied: a mapped one would also hold pages of its neighbors.
_WORTH_MAPPING_BYTES = 1 << 20


def build_skeleton(folder: Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Build the model of a folder's config.json, with shapes and without storage.

    Raises: ConfigError if transformers refuses the settings.
    """
    try:
        return _skeleton(folder, dtype, attention)
    except (FinetuneError, ImportError, MemoryError):
        raise
    except Exception as error:  # transformers checks some settings, and fails on others deep inside
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{folder / 'config.json'}: transformers cannot build the model: {reason}") from error


def _skeleton(folder: Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    family = family_of(config.model_type, str(folder))
    for key in family.loaded_settings:
        config = getattr(config, key)
    attention = attention_of(family, attention)
    with torch.device("meta"):
        base: PreTrainedModel = model_class(family)._from_config(config, dtype=dtype, attn_implementation=attention)
    with suppress(OSError):  # no file: the model keeps the one made from its config
        base.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return base


def model_class(family: ModelFamily) -> Any:
    """Return the class of transformers that is loaded."""
    return getattr(importlib.import_module(family.modeling), family.model)


def attention_of(family: ModelFamily, kernel: str) -> Any:
    """Return `attn_implementation` of a model: the kernel in the decoder, and torch's own in towers."""
    if not family.towers:
        return kernel
    return {
        "": kernel,
        **dict.fromkeys(family.decoder_settings, kernel),
        **dict.fromkeys(family.tower_settings, "sdpa"),
    }


def load_plain(
    folder: Path, files: Mapping[str, TensorFile], *, model: ModelConfig, attention: str
) -> PreTrainedModel | None:
    """Load the base unquantized, in eval mode and on the CPU, with large tensors left in their files.

    Returns: None as `load_four_bit`.
    """
    base = build_skeleton(folder, getattr(torch, model.dtype), attention)
    if not holds_all(files, base):
        return None
    fill_plain(base, files, torch.device("cpu"))
    return base.eval()


def holds_all(files: Mapping[str, TensorFile], base: PreTrainedModel) -> bool:
    """Return whether the files hold exactly the model's tensors, each with its shape."""
    # A tied weight counts once, by its name in the files.
    wanted = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    for tied in base.all_tied_weights_keys:
        wanted.pop(tied, None)
    if wanted.keys() != files.keys():
        return False
    headers = {file: read_header(file)[1] for file in {place.file for place in files.values()}}
    return all(tuple(headers[file][stored]["shape"]) == wanted[name] for name, (file, stored) in files.items())


def fill_plain(base: PreTrainedModel, files: Mapping[str, TensorFile], device: torch.device) -> None:
    """Load every tensor that is not quantized from the original files; on a CPU, large tensors stay mapped.

    The cache does not copy them: at 0.5B the embedding alone would double its size.
    """
    quantized = [*quantized_layers(base, "nf4"), *quantized_layers(base, "int8")]
    for name in files.keys() - {f"{layer}.weight" for layer, _ in quantized}:
        stored = read_tensor(*files[name])
        tensor = stored.to(device=device, dtype=base.dtype)
        if tensor is stored and tensor.nbytes < _WORTH_MAPPING_BYTES:
            tensor = tensor.clone()
        owner, _, key = name.rpartition(".")
        setattr(base.get_submodule(owner), key, nn.Parameter(tensor, requires_grad=False))
    for name, module in list(base.named_modules()):
        # Tables computed from the config, like rotary frequencies; always computed on the CPU.
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            base.set_submodule(name, _with_tables(base, module).to(device))
    base.tie_weights()


def _with_tables(base: PreTrainedModel, module: nn.Module) -> nn.Module:
    """Return a module with its tables on the CPU."""
    if hasattr(module, "config"):
        return type(module)(module.config)
    module.to_empty(device="cpu", recurse=False)
    base._init_weights(module)
    return module
