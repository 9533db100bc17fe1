"""The frozen base in 4 or 8 bit, through bitsandbytes, and the proof that what was asked for is what was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from finetune.config.schema import QuantConfig
from finetune.models.families import family_of
from finetune.models.quant.bit_widths import storage_of
from finetune.system.errors import FinetuneError, MissingExtra


def storage_in(model: PreTrainedModel, cfg: QuantConfig) -> dict[str, str]:
    """What each of a model's linear layers is to be stored as, by full name. Raises: as `storage_of`."""
    return storage_of(cfg, linear_names(model), head_name(model))


def quantization_config(cfg: QuantConfig, storage: Mapping[str, str]) -> BitsAndBytesConfig | None:
    """What transformers needs to quantize a model while it loads; None for plain 16 or 32 bit.

    storage: from `storage_of`. What is stored otherwise than `quant.type` says goes by its full name, because
    transformers matches a shorter one from the start of a name or as a suffix, silently nothing otherwise, and replaces
    its own list (the head) by this one.
    Raises: MissingExtra if bitsandbytes can't be imported.
    """
    if cfg.type == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise MissingExtra(
            f'quant.type={cfg.type} needs bitsandbytes: pip install "bitsandbytes>=0.49" (or set quant.type=none)'
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=cfg.type == "nf4",
        load_in_8bit=cfg.type == "int8",
        llm_int8_skip_modules=sorted(name for name, kind in storage.items() if kind != cfg.type),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=cfg.double,
        # Its own default computes in fp32.
        bnb_4bit_compute_dtype=getattr(torch, cfg.compute_dtype),
    )


def keep_weights_trainable_after_eval(model: nn.Module) -> None:
    """Stop bitsandbytes from re-packing 4-bit weights; call it right after loading, before any forward pass.

    On CPUs with AVX512-BF16, a Linear4bit re-packs its weight the first time it runs in eval mode on an input that
    needs no gradient, and stays packed in train mode. The packed product has no autograd: the gradient through the
    layer's base weight would then be missing, silently, after the first evaluation or sample. Can go once bitsandbytes
    gives the packed path a backward.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_quantized(model: PreTrainedModel, cfg: QuantConfig) -> None:
    """Proves that exactly the layers asked for are quantized, as asked, and that all else has the model's dtype.

    Raises: FinetuneError naming the modules that are not as they should be.
    """
    storage = storage_in(model, cfg)
    wrong = []
    for name, module in model.named_modules():
        found, wanted = stored_as(module), storage.get(name, "none")
        if wanted != found:
            wrong.append(f"{name} is stored as {found}, not {wanted}")
        for parameter_name, parameter in module.named_parameters(name, recurse=False):
            plain = wanted == "none" or not parameter_name.endswith(".weight")
            if plain and parameter.dtype != model.dtype:
                wrong.append(f"{parameter_name} is {parameter.dtype}, not {model.dtype}")
    if wrong:
        raise FinetuneError("the model was not loaded as quant and model.dtype ask: " + "; ".join(wrong))


def linear_names(model: nn.Module) -> list[str]:
    """Full names of all linear layers, the head included, quantized or not."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def head_name(model: PreTrainedModel) -> str:
    """Full name of the output layer."""
    return family_of(model.config.model_type, "the model").head


def stored_as(module: nn.Module) -> str:
    """How a module stores its weight, in the words of `quant.type`."""
    weight: Any = getattr(module, "weight", None)
    match type(module).__name__:
        case "Linear4bit":
            return weight.quant_type if weight.quant_state is not None else "unquantized 4-bit"
        case "Linear8bitLt":
            return "int8" if weight.dtype == torch.int8 else "unquantized int8"
    return "none"
