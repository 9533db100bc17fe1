"""The frozen base in 4 or 8 bit, through bitsandbytes, and the proof that what was asked for is what was loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from finetune.config.schema import QuantConfig
from finetune.errors import ConfigError, FinetuneError, MissingExtra
from finetune.models.families import family_of
from finetune.models.names import close_names, matches

FOUR_BIT = ("nf4", "fp4")


def kept_modules(cfg: QuantConfig, module_names: list[str], head: str) -> list[str]:
    """Full names of the linear layers that stay in 16 bit: the head, and what `quant.keep` names.

    module_names: full names of all linear layers.
    Raises: ConfigError naming every entry of `quant.keep` that matches no layer.
    """
    found = {pattern: [name for name in module_names if matches(pattern, name)] for pattern in cfg.keep}
    lost = [
        f"quant.keep: {pattern!r} matches no linear layer; {close_names(pattern, module_names)}"
        for pattern, names in found.items()
        if not names
    ]
    if lost:
        raise ConfigError("\n".join(lost))
    return sorted({head}.union(*found.values()))


def quantization_config(cfg: QuantConfig, kept: list[str]) -> BitsAndBytesConfig | None:
    """What transformers needs to quantise a model while it loads; None for plain 16 or 32 bit.

    kept: from `kept_modules`. Full names, because transformers matches a shorter one from the start of a name or as a
    suffix, silently nothing otherwise, and replaces its own list (the head) by this one.
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
        load_in_4bit=cfg.type in FOUR_BIT,
        load_in_8bit=cfg.type == "int8",
        llm_int8_skip_modules=kept,
        bnb_4bit_quant_type=cfg.type if cfg.type in FOUR_BIT else "nf4",
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
    """Proves that exactly the layers asked for are quantised, as asked, and that all else has the model's dtype.

    Raises: FinetuneError naming the modules that are not as they should be.
    """
    linear = linear_names(model)
    quantised = set() if cfg.type == "none" else set(linear) - set(kept_modules(cfg, linear, head_name(model)))
    wrong = []
    for name, module in model.named_modules():
        found = stored_as(module)
        if (wanted := cfg.type if name in quantised else "none") != found:
            wrong.append(f"{name} is stored as {found}, not {wanted}")
        for parameter_name, parameter in module.named_parameters(name, recurse=False):
            plain = not (name in quantised and parameter_name.endswith(".weight"))
            if plain and parameter.dtype != model.dtype:
                wrong.append(f"{parameter_name} is {parameter.dtype}, not {model.dtype}")
    if wrong:
        raise FinetuneError("the model was not loaded as quant and model.dtype ask: " + "; ".join(wrong))


def linear_names(model: nn.Module) -> list[str]:
    """Full names of all linear layers, the head included, quantised or not."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def head_name(model: PreTrainedModel) -> str:
    """Full name of the output layer."""
    return family_of(model.config.model_type, "the model").head


def stored_as(module: nn.Module) -> str:
    """How a module stores its weight, in the words of `quant.type`."""
    weight: Any = getattr(module, "weight", None)
    match type(module).__name__:
        case "Linear4bit":
            return weight.quant_type if weight.quant_state is not None else "unquantised 4-bit"
        case "Linear8bitLt":
            return "int8" if weight.dtype == torch.int8 else "unquantised int8"
    return "none"
