"""Quantization settings for bitsandbytes, and the check that the loaded model matches them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from finetune.config.schema import QuantConfig
from finetune.models.decoder import family_in
from finetune.models.quant.bit_widths import storage_of
from finetune.system.errors import FinetuneError, MissingExtra


def storage_in(model: PreTrainedModel, cfg: QuantConfig) -> dict[str, str]:
    """Return the storage of each linear layer of a model, by full name. Raises: as `storage_of`."""
    decoder = linear_names(model)
    towers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return dict.fromkeys(towers, "none") | storage_of(cfg, decoder, head_name(model))


def quantization_config(cfg: QuantConfig, storage: Mapping[str, str]) -> BitsAndBytesConfig | None:
    """Build the settings with which transformers quantizes a model while loading; None for 16 or 32 bit.

    Layers stored differently from `quant.type` are listed by full name: transformers matches a shorter name as a
    prefix or suffix, and its own list (the head) is replaced by this one. storage: from `storage_of`.

    Raises:
        MissingExtra: bitsandbytes cannot be imported.
    """
    if cfg.type == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise MissingExtra(
            f'quant.type={cfg.type} needs bitsandbytes\nhelp: pip install "bitsandbytes>=0.49", or set quant.type=none'
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
    """Stop bitsandbytes from repacking 4-bit weights. Call it after loading, before any forward pass.

    On CPUs with AVX512-BF16, a Linear4bit repacks its weight at its first run in eval mode without gradients, and stays
    packed in train mode. The packed matmul has no autograd, so the gradient through the base weight would silently be
    missing after the first evaluation. Remove this when the packed path of bitsandbytes has a backward.
    """
    for _, module in quantized_layers(model, "nf4"):
        module.support_avx512bf16_for_cpu = False


def check_quantized(model: PreTrainedModel, cfg: QuantConfig) -> None:
    """Raise FinetuneError unless exactly the configured layers are quantized and all others have the model's dtype."""
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
        raise FinetuneError("quant: the loaded model does not match quant and model.dtype: " + "; ".join(wrong))


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the full names of all linear layers of the decoder, quantized or not, and of the head.

    Those of vision and audio towers are not among them: towers stay in 16 bit.
    """
    towers = tuple(f"{tower.module}." for tower in family_in(model).towers.values())
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in linears if not name.startswith(towers)]


def head_name(model: PreTrainedModel) -> str:
    """Return the full name of the output layer."""
    return family_in(model).head


def quantized_layers(model: nn.Module, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield every layer of bitsandbytes of a kind, nf4 or int8, with its full name; its weight may be missing yet."""
    import bitsandbytes as bnb

    wanted = bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt
    for name, module in model.named_modules():
        if isinstance(module, wanted):
            yield name, module


def stored_as(module: nn.Module) -> str:
    """Return how a module stores its weight, as a value of `quant.type`."""
    weight: Any = getattr(module, "weight", None)
    match type(module).__name__:
        case "Linear4bit":
            return weight.quant_type if weight.quant_state is not None else "unquantized 4-bit"
        case "Linear8bitLt":
            return "int8" if weight.dtype == torch.int8 else "unquantized int8"
    return "none"
